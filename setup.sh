#!/usr/bin/env bash
# Makes the virtual environment from requirements.lock.  Usage: setup.sh VENV
set -euo pipefail
venv=${1:?usage: setup.sh VENV}
fail() { echo "setup: $*" >&2; exit 1; }

python=
for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || fail "no Python 3.10, 3.11 or 3.12 found (apt-get install python3, or set PYTHON=/path/to/python)"
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python lacks venv (apt-get install python3-venv)"
command -v g++ >/dev/null || fail "no C++ compiler found (apt-get install g++)"
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -f "$headers/Python.h" ] || fail "$python lacks its C headers (apt-get install python3-dev)"
[ "$(uname -m)" = x86_64 ] || fail "the locked wheels are for x86-64, this machine is $(uname -m)"

echo "setup: $("$python" --version) -> $venv (about 6 GB, a few minutes the first time)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
"${pip[@]}" install --requirement requirements.lock
"${pip[@]}" install --no-deps --no-build-isolation --editable .
