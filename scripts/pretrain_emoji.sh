#!/usr/bin/env bash
# Make stylegan_rooted/assets/emoji32.pkl: a 32x32 network trained from scratch on faces, people and hearts of the Noto emoji
# (Apache License 2.0), which the npm package emoji-datasource-google 16.0.0 brings. Takes a folder to work in.
# Needs npm and an installed stylegan-rooted; about an hour on one core.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:?usage: scripts/pretrain_emoji.sh WORK_FOLDER}" && cd "$1"
if [ ! -d package ]; then
  npm pack emoji-datasource-google@16.0.0
  tar xzf emoji-datasource-google-16.0.0.tgz
fi
python "$here/select_noto.py" package noto-faces
stylegan-rooted dataset build noto-faces noto-faces-32.zip --resolution 32 --resize-filter box --overwrite
stylegan-rooted finetune --resume none --data noto-faces-32.zip --outdir runs --loss logistic --kimg "${KIMG:-120.176}" \
  --cbase 2048 --cmax 128 --zdim 128 --wdim 128 --batch 16 --gamma 0.1 --ema-kimg 5 --mirror true \
  --style-mixing 0 --pl-weight 0 --g-reg-interval none --aug ada --ada-kimg 100 \
  --tick 2 --snap 5 --grid 16x8 --metrics fid,kid --metric-num 1000 --detector embedded --seed 0 --threads 1
