#!/usr/bin/env bash
# Create or update .venv with the tested versions; does nothing when it is up to date. Called by the Makefile.
# Usage: scripts/make_venv.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
stamp=.venv/.installed # written last: an interrupted installation is taken up again, a finished one is not repeated
place=$(cat "$stamp" 2>/dev/null || true) # where the environment was made: it does not survive a move
if [ "$place" = "$PWD" ] && [ ! pyproject.toml -nt "$stamp" ] && [ ! constraints.txt -nt "$stamp" ]; then
  exit 0
fi
fail() { echo "Error: $*" >&2; exit 1; }
command -v "$python" >/dev/null || fail "there is no $python; name one of Python 3.10 or newer: make venv PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$python is $("$python" -V 2>&1), older than 3.10; name a newer one: make venv PYTHON=python3.12"
if [ "${place:-$PWD}" != "$PWD" ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  "$python" -m venv --clear .venv ||
    fail "$python cannot make a virtual environment (on Debian and Ubuntu: apt-get install python3-venv)"
fi
echo "Installing into $PWD/.venv (a few minutes the first time)" >&2
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
.venv/bin/python -m pip install --quiet -c constraints.txt torch==2.13.0 torchvision==0.28.0
.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[demo,fid,tensorboard,yaml,onnx,study,dev]"
pwd >"$stamp"
