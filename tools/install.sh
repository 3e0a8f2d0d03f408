#!/bin/sh
# Make a virtual environment and install this package in it. Called by the Makefile; safe to run again after an interruption.
#
#   sh tools/install.sh VENV TORCH [EXTRAS]      TORCH: cpu | cuda     EXTRAS: for example [dev]
#   PYTHON=/path/to/python3 chooses the interpreter; otherwise the first that fits on PATH.
set -eu
venv=$1
torch=$2
extras=${3:-}
cpu_index=https://download.pytorch.org/whl/cpu

say() { printf '%s\n' "$*"; }
stop() { say "$*" >&2; exit 2; }

fits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        fits "$PYTHON" || stop "PYTHON=$PYTHON is not a Python 3.11 or newer with the venv and ensurepip modules; name another, or leave PYTHON out."
        say "$PYTHON"
        return
    fi
    for candidate in python3.13 python3.12 python3.11 python3; do
        if fits "$candidate"; then say "$candidate"; return; fi
    done
    stop "No Python 3.11 or newer with the venv module is on PATH; install one (Debian, Ubuntu: apt install python3-venv;" \
        "macOS: brew install python@3.13) or name one with make PYTHON=/path/to/python3."
}

case $torch in
    cpu | cuda) ;;
    *) stop "TORCH=$torch is unknown; it is cpu or cuda." ;;
esac

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        stop "$venv exists and is not a virtual environment; name another place with make VENV=path."
    fi
    python=$(find_python)
    say "making $venv with $("$python" --version) ($(command -v "$python"))"
    "$python" -m venv --clear "$venv"
fi
python=$venv/bin/python

# On Linux the package index's default torch brings gigabytes of CUDA libraries, so the CPU build has an index of its own.
reachable() {
    "$python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5)' "$cpu_index" >/dev/null 2>&1
}
index=
if [ "$torch" = cpu ] && [ "$(uname -s)" = Linux ]; then
    if reachable; then
        index="--extra-index-url $cpu_index"
    else
        say "$cpu_index does not answer: torch comes from the default package index (perhaps the larger CUDA build)"
    fi
fi

# The two builds have one version number, so pip alone would not change one for the other.
installed=$(cat "$venv/.torch-build" 2>/dev/null || true)
if [ -n "$installed" ] && [ "$installed" != "$torch" ]; then
    "$python" -m pip uninstall --quiet --yes torch
fi
# shellcheck disable=SC2086  # the index is two words or none
"$python" -m pip install --quiet --constraint constraints.txt $index torch
say "$torch" >"$venv/.torch-build"
"$python" -m pip install --quiet --constraint constraints.txt --editable ".$extras"
"$python" -c 'import torch; print(f"torch {torch.__version__} is installed,", "CUDA is there" if torch.cuda.is_available() else "on CPU")'
