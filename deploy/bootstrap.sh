#!/bin/sh
# Makes a Debian machine able to run the demo and the tests: missing system packages, a virtual
# environment in .venv, and the Python packages of pyproject.toml. Changes nothing that is there already
# and says each thing it does in one line. `make` calls it; it needs root only to install packages.
#
# usage: deploy/bootstrap.sh [--root]     --root: what comes next needs root, so say so first
set -eu
cd "$(dirname "$0")/.."

VENV=.venv
STAMP=$VENV/.bootstrapped
LOG=${TMPDIR:-/tmp}/flanneld-bootstrap.$$.log
trap 'rm -f "$LOG"' EXIT

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

# The line of a log that tells most: the last that names an error, else the last.
reason() { { grep -iE 'error|fail|could not' "$LOG" || cat "$LOG"; } | tail -n 1; }

as_root() { [ "$(id -u)" = 0 ] || fail "$1 needs root: run it with sudo"; }

install() {
    as_root "installing $*"
    command -v apt-get >/dev/null || fail "this is not Debian: install $* with your own package tool and try again"
    export DEBIAN_FRONTEND=noninteractive
    if [ -z "${apt_updated:-}" ]; then
        say "apt-get update"
        apt-get update >"$LOG" 2>&1 || fail "apt-get update failed, is there a network? It says: $(reason)"
        # with mirrors out of reach apt-get only warns and ends with 0
        ! grep -q '^W: Failed to fetch' "$LOG" || fail "Debian's packages cannot be reached: $(reason)"
        apt_updated=1
    fi
    say "apt-get install $*"
    apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=120 "$@" >"$LOG" 2>&1 </dev/null ||
        fail "apt-get install $* failed: $(reason)"
}

# Interpreter to build .venv with: the first that is new enough, "" when there is none.
find_python() {
    for python in ${PYTHON:-python3 python3.13 python3.12 python3.11 /usr/bin/python3}; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
}

[ "${1:-}" != --root ] || as_root "building network namespaces"

exec 9<. && flock 9    # two makes at once take turns

# /usr/sbin is not on everybody's path
PATH=$PATH:/usr/sbin:/sbin
missing=
for pair in ip:iproute2 nft:nftables iptables:iptables ping:iputils-ping ps:procps; do
    command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair#*:}"
done
[ -z "$missing" ] || install $missing

wanted=$(cat pyproject.toml deploy/bootstrap.sh | sha256sum)
if [ -e "$STAMP" ] && [ "$(cat "$STAMP")" = "$wanted" ] && "$VENV/bin/python" -c '' 2>/dev/null; then
    exit 0
fi

python=$(find_python)
if [ -z "$python" ]; then
    install python3 python3-venv
    python=$(find_python)
    [ -n "$python" ] || fail "Python 3.11 or later is needed, Debian's is older here: install one and set PYTHON=/path/to/it"
fi
# Debian splits venv's parts off into a package
"$python" -c 'import ensurepip, venv' 2>/dev/null || install python3-venv
if ! "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    say "virtual environment in $VENV ($("$python" --version))"
    "$python" -m venv --clear "$VENV" >"$LOG" 2>&1 || fail "the virtual environment cannot be made: $(reason)"
fi
say "Python packages of pyproject.toml into $VENV"
"$VENV/bin/pip" install --disable-pip-version-check --no-input -q -e '.[dev]' >"$LOG" 2>&1 </dev/null ||
    fail "pip cannot install the packages, is PyPI reachable? It says: $(reason)"
echo "$wanted" >"$STAMP"
say "ready"
