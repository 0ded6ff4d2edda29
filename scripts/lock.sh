#!/usr/bin/env bash
# Resolves pyproject.toml and requirements/*.in into the locks that setup.sh installs. Downloads metadata only, and the
# CPU build of torch. For maintainers: `make lock`.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
.venv/bin/python -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q uv==0.13.9
# uv does not read pip's settings, and plain registries do not have this build: hand it over as a file.
if ! .venv/bin/pip download -q --no-deps -d "$tmp/wheels" "torch==$TORCH+cpu"; then
    .venv/bin/pip download -q --no-deps -d "$tmp/wheels" --index-url "$PYTORCH_CPU_INDEX" "torch==$TORCH+cpu"
fi
# Its requirements are the same for every Python: a name that says so lets one resolution serve 3.11 to 3.13.
mv "$tmp"/wheels/torch-*.whl "$tmp/wheels/torch-$TORCH+cpu-py3-none-any.whl"

compile() { # compile LOCK INPUT...
    local lock=$1
    shift
    echo "$lock"
    "$tmp/venv/bin/uv" pip compile -q --upgrade --universal --python-version 3.11 --annotation-style line \
        --custom-compile-command "make lock" --output-file "$tmp/lock" "$@"
    # Every line repeats the platform that pyproject.toml limits the resolution to, and names the temporary files.
    sed -E -e "s/( and)? platform_machine == 'x86_64' and sys_platform == 'linux'//" \
        -e "s/ ; python_full_version < '3.14'(  #|$)/\1/" -e "s/-c [^ ,]+(, )?//" -e "s/, $//" \
        "$tmp/lock" >"$lock"
}

cpu_torch=(--find-links "$tmp/wheels")
extras=(--extra llm --extra cloud --extra demo --extra dev)
compile requirements/cpu.txt pyproject.toml requirements/cpu.in --extra cpu "${extras[@]}" "${cpu_torch[@]}" \
    --overrides requirements/cpu-overrides.in
compile requirements/gpu.txt pyproject.toml --extra gpu "${extras[@]}"
grep -v '^setuptools==' requirements/cpu.txt >"$tmp/cpu.txt"
compile requirements/build.txt requirements/build.in --constraints "$tmp/cpu.txt" "${cpu_torch[@]}"
echo "torch==$TORCH+cpu" >"$tmp/torch.txt"
compile requirements/comet-cpu.txt requirements/comet.in --constraints "$tmp/torch.txt" "${cpu_torch[@]}"
compile requirements/comet-gpu.txt requirements/comet.in
compile requirements/quantize-cpu.txt requirements/quantize.in --constraints "$tmp/torch.txt" "${cpu_torch[@]}"
compile requirements/quantize-gpu.txt requirements/quantize.in
