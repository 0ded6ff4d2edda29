#!/usr/bin/env bash
# Makes an environment beside .venv for libraries whose pins differ; raylp calls it as a process. Returns at once when
# nothing changed.
#   comet     .venv-comet: COMET needs transformers < 5, numpy < 2 and protobuf < 5
#   quantize  .venv-quantize: llm-compressor needs an older transformers and a newer compressed-tensors than vllm
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh

case ${1:-} in
    comet) TITLE="COMET" IMPORT=comet NEWEST=12 ;; # numpy < 2 has no build for Python 3.13
    quantize) TITLE="llm-compressor" IMPORT=llmcompressor NEWEST=13 ;;
    *) die "usage: setup_beside.sh comet|quantize" 2 ;;
esac
VENV=.venv-$1
choose 11 "$NEWEST"
LOCK=requirements/$1-$STACK.txt
fresh "$LOCK" scripts/setup_beside.sh scripts/common.sh && exit

install_pip() {
    pip "$(grep '^pip==' requirements/build.txt | cut -d ' ' -f 1)"
}

open_venv "Setting up $TITLE" 4 "$([[ $STACK == gpu ]] && echo 10 || echo 3)"
step "pip" install_pip
step "torch $TORCH" install_torch
step "$(grep -c == "$LOCK") packages" install_lock "$LOCK"
step "check: import $IMPORT" "$VENV/bin/python" -I -c "import $IMPORT"
seal
echo "Done."
