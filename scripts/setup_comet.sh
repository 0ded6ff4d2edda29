#!/usr/bin/env bash
# Makes .venv-comet, which raylp's COMET process runs in: COMET needs transformers < 5, numpy < 2 and protobuf < 5, which
# cannot share an environment with vllm. Returns at once when nothing changed.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh

VENV=.venv-comet
# numpy < 2 has no build for Python 3.13.
choose 11 12
fresh "requirements/comet-$STACK.txt" scripts/setup_comet.sh scripts/common.sh && exit

install_pip() {
    pip "$(grep '^pip==' requirements/build.txt | cut -d ' ' -f 1)"
}

open_venv "Setting up COMET" 4 $([[ $STACK == gpu ]] && echo 10 || echo 3)
step "pip" install_pip
step "torch $TORCH" install_torch
step "$(grep -c == "requirements/comet-$STACK.txt") packages" install_lock "requirements/comet-$STACK.txt"
step "check: import comet" "$VENV/bin/python" -I -c "import comet"
seal
echo "Done."
