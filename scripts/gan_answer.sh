#!/usr/bin/env bash
# The paired GAN experiments of docs/experiments.md: does the rooted loss help fine-tuning, and training from scratch?
#
#   scripts/gan_answer.sh FOLDER [STAGE ...]     all stages by default
#
#     finetune  three targets, full and 100 images; logistic, k = 2 as given, calibrated and with a linear tail, k = 8,
#               and k from 2 to 64 within 2 kimg
#     long      all digits for 8 kimg, as their baseline has not levelled off at 3
#     tune      Twemoji, learning rate and gamma chosen for every arm from one grid
#     scratch   200 images of 64x64 from scratch, otherwise "auto": logistic, k = 2, k = 20
#
# Needs the extra: .venv/bin/python -m pip install -e '.[experiments]' -c constraints.txt
# Builds the data sets on first use, trains with two processes of one thread each, and writes FOLDER/NAME/compare.{json,md,html}.
# What is done is not repeated: interrupted by INT or TERM, which end its processes too, the same command goes on.
# Run times on two cores stand in docs/experiments.md.
set -euo pipefail
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }
case ${1-} in
  -h | --help) usage && exit ;;
  '' | -*) usage >&2 && exit 2 ;;
esac
here=$(cd "$(dirname "$0")/.." && pwd)
folder=$1
stages=(finetune long tune scratch)
known=" ${stages[*]} "
[ $# -eq 1 ] || stages=("${@:2}")
for stage in "${stages[@]}"; do
  [[ $known == *" $stage "* ]] || { echo "unknown stage $stage; the stages are$known" >&2 && exit 2; }
done

# All that is long runs in the background and is waited for, as a trap would wait for what runs in the foreground; TERM
# ends it, as a script's background processes ignore INT.
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

bin=${BIN:-$here/.venv/bin}
mkdir -p "$folder" && cd "$folder"
[ -f data/digits-32.zip ] || { "$bin/python" "$here/scripts/experiment_targets.py" data & wait $!; }

common=(--seeds 0-4 --threads 1 --device cpu --keep-last 1 --grid 8x4 --batch 16 --metrics fid,kid --metric-num 1000 --snap 1)

# shares NAME OPTIONS...: half of the runs each in two processes; when both have ended, the status of the first that failed.
shares() {
  local name=$1 pids=() share status=0
  shift
  for share in 1/2 2/2; do
    "$bin/stylegan-rooted" compare --outdir "$name" "${common[@]}" "$@" --only "$share" >>"$name.${share%/*}.log" 2>&1 &
    pids+=($!)
  done
  for share in "${pids[@]}"; do wait "$share" || status=$((status ? status : $?)); done
  [ "$status" -eq 0 ] || echo "$name failed; $folder/$name.1.log and $name.2.log say why" >&2
  return "$status"
}

# compare NAME OPTIONS...: all runs, then the result.
compare() {
  shares "$@"
  local name=$1
  shift
  "$bin/stylegan-rooted" compare --outdir "$name" "${common[@]}" "$@" & wait $!
}

# The demonstration's settings, which were found for the rooted loss at k = 2 with a tail.
shared=(--aug noaug --pl-weight 0 --style-mixing 0 --g-reg-interval none --ema-kimg 0.5
  --resume "$here/stylegan_rooted/assets/emoji32.pkl")
rates=(--gamma 0.5 --glr 0.002 --dlr 0.002)

losses="logistic,rooted:k=2,rooted:k=2,scale=calibrated,rooted:k=8,rooted:k=2,tail=4,rooted:k=2:64@2"

# both TARGET MIRROR KIMG: the full set for KIMG, then 100 images for 2.5 kimg. On Twemoji the baseline levels off at 3 kimg.
both() {
  compare "$1-full" --losses "$losses" --data "data/$1-32.zip" --mirror "$2" --kimg "$3" --tick 1 "${shared[@]}" "${rates[@]}"
  compare "$1-100" --losses "$losses" --data "data/$1-32.zip" --mirror "$2" --subset 100 --kimg 2.5 --tick 0.5 \
    "${shared[@]}" "${rates[@]}"
}

for stage in "${stages[@]}"; do
  case $stage in
    finetune)
      both twemoji true 5
      both openmoji true 3
      both digits false 3
      ;;
    long)
      compare digits-long --losses "logistic,rooted:k=2,rooted:k=2,tail=4" --data data/digits-32.zip --mirror false --kimg 8 --tick 2 \
        "${shared[@]}" "${rates[@]}"
      ;;
    tune)
      tuned=(--losses logistic,rooted:k=2 --data data/twemoji-32.zip --mirror true --kimg 5 --tick 1 "${shared[@]}"
        --tune "lr=0.001,0.002,0.004;gamma=0.1,0.5,2" --tune-kimg 2.5)
      shares twemoji-tuned "${tuned[@]}"  # the search ends before what it chose begins
      compare twemoji-tuned "${tuned[@]}"
      ;;
    scratch)
      compare twemoji-scratch --losses logistic,rooted:k=2,rooted:k=20 --data data/twemoji-64.zip --mirror true --subset 200 \
        --resume none --cbase 2048 --cmax 64 --kimg 3 --tick 1
      ;;
  esac
done
