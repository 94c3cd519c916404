# Sourced by demo, test and run: installs what is missing and makes .venv. Needs root or sudo for packages.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

say() { printf '== %s\n' "$*" >&2; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# packages NAME...: install those Debian packages that are missing; the index is fetched only if that fails.
packages() {
    local missing=() name
    for name in "$@"; do
        dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null | grep -qx installed || missing+=("$name")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing ${missing[*]}"
    local install=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install "${missing[@]}")
    if ! as_root "${install[@]}" >/dev/null 2>&1; then
        as_root apt-get -qq update >&2
        as_root "${install[@]}" >&2
    fi
}

# The system's Python is tried first: ordinary users, whom the rootless tests make, can run it.
python_for_venv() {
    local candidate
    for candidate in /usr/bin/python3 python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# venv run|dev: .venv with this checkout installed in it; made again only if pyproject.toml or Python changed.
venv() {
    local kind=$1 python stamp spec=.
    python=$(python_for_venv) || { packages python3; python=$(python_for_venv); } || {
        echo "no Python 3.11 or newer: install one and try again" >&2
        exit 1
    }
    "$python" -c 'import ensurepip, venv' 2>/dev/null || packages python3-venv
    stamp="$("$python" -c 'import sys; print(sys.version)') $(sha256sum pyproject.toml)"
    [ "$(cat ".venv/stamp-$kind" 2>/dev/null)" != "$stamp" ] || return 0
    say "making .venv with $python"
    "$python" -m venv --clear .venv
    [ "$kind" = run ] || spec='.[dev]'
    .venv/bin/python -m pip install -qq --disable-pip-version-check -e "$spec" >&2
    echo "$stamp" >.venv/stamp-run
    [ "$kind" = run ] || echo "$stamp" >.venv/stamp-dev
}
