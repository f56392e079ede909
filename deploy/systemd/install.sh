#!/bin/sh
# Installs flanneld as a systemd service from a wheel, or from this source tree, into a virtual environment of its own.
# Running it again upgrades, or does nothing. README.md beside it tells what comes where and why.
#
# usage: deploy/systemd/install.sh [--prefix DIR] [--docker] [--start] [WHEEL]
#        deploy/systemd/install.sh [--prefix DIR] --uninstall
#
#   --prefix DIR  where the programs go (default /opt/flanneld)
#   --docker      also make Docker take its subnet from flanneld, from Docker's next start on
#   --start       enable and (re)start flanneld; without it nothing is started or stopped
#   --uninstall   stop and remove all that was installed, but no file that was edited since
#
# pip's own variables (PIP_INDEX_URL, PIP_NO_INDEX, PIP_FIND_LINKS …) tell where the dependencies come from.
set -eu
HERE=$(cd "$(dirname "$0")" && pwd)
TREE=$(cd "$HERE/../.." && pwd)
PREFIX=/opt/flanneld
WHEEL= DOCKER= START= UNINSTALL= CHANGED=

say() { echo "flanneld: $*"; }
fail() { echo "flanneld: $*" >&2; exit 1; }
usage() { sed -n '/^# usage/,/^# pip/s/^# \{0,1\}//p' "$0"; }

while [ $# -gt 0 ]; do
    case $1 in
        --prefix) PREFIX=${2:?flanneld: --prefix needs a directory}; shift ;;
        --prefix=*) PREFIX=${1#*=} ;;
        --docker) DOCKER=1 ;;
        --start) START=1 ;;
        --uninstall) UNINSTALL=1 ;;
        -h | --help) usage; exit 0 ;;
        -*) fail "there is no option $1: --help lists them" ;;
        *) [ -z "$WHEEL" ] || fail "one wheel is enough, $1 is another"; WHEEL=$1 ;;
    esac
    shift
done
case $PREFIX in
    *[!A-Za-z0-9/._-]*) fail "--prefix $PREFIX has characters that a unit file would need quotes for" ;;
    /?*) ;;
    *) fail "--prefix $PREFIX is no absolute path" ;;
esac
[ -z "$WHEEL" ] || [ -f "$WHEEL" ] || fail "there is no wheel $WHEEL"
[ "$(id -u)" = 0 ] || fail "installing a service needs root: run it with sudo"
command -v systemctl >/dev/null || fail "there is no systemd on this host"
MANIFEST=$PREFIX/installed    # what was put where, in the form of sha256sum: tells edited files
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
umask 022

# -- the programs -----------------------------------------------------------------------------------------------------

find_python() {
    for python in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
}

# What went wrong in a few words: the network if pip names it, else its first error.
reason() {
    grep -m1 -oiE "temporary failure in name resolution|certificate verify failed|connection (refused|timed out|reset)|\
network is unreachable|no route to host|no space left on device" "$WORK/log" ||
        grep -m1 -oE 'ERROR: .*' "$WORK/log" || tail -n 1 "$WORK/log"
}

# Each version has an environment of its own, and $PREFIX/bin points to one of them. So a running daemon never finds the
# modules of another version, and the one before is a symbolic link away.
install_programs() {
    if [ -e "$PREFIX/bin" ] && [ ! -L "$PREFIX/bin" ]; then
        fail "$PREFIX/bin was not made by this script: remove $PREFIX, or choose another --prefix"
    fi
    if [ -n "$WHEEL" ]; then
        source=$WHEEL
        digest=$(sha256sum <"$WHEEL" | cut -c1-12)
    else
        source=$WORK/tree    # a copy, because pip leaves its build directory in the tree
        mkdir "$source"
        (cd "$TREE" && tar -c --exclude=__pycache__ pyproject.toml README.md flanneld backends) | tar -x -C "$source"
        digest=$(cd "$source" && find . -type f | LC_ALL=C sort | xargs cat | sha256sum | cut -c1-12)
    fi
    version=$PREFIX/versions/$digest
    if ! "$version/bin/flanneld" --version >/dev/null 2>&1; then
        python=$(find_python)
        [ -n "$python" ] || fail "Python 3.11 or later is needed: install one and set PYTHON=/path/to/it"
        "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "Python's venv is missing, on Debian: apt-get install python3-venv"
        say "installing into $version ($("$python" --version))"
        rm -rf "$version"
        # pip compiles every module, which the daemon could not: its file system is read-only
        if ! { "$python" -m venv "$version" &&
            "$version/bin/pip" install --disable-pip-version-check --no-input -q "$source" &&
            "$version/bin/flanneld" --version; } >"$WORK/log" 2>&1 </dev/null; then
            rm -rf "$version"
            fail "pip cannot install it, is PyPI reachable? It says: $(reason)"
        fi
    fi
    before=$(readlink "$PREFIX/bin" 2>/dev/null || true)
    before=${before%/bin}
    if [ "$before" != "versions/$digest" ]; then
        ln -sfn "versions/$digest/bin" "$PREFIX/bin.new"
        mv -T "$PREFIX/bin.new" "$PREFIX/bin"
        CHANGED=1
        say "$PREFIX/bin is version $("$PREFIX/bin/flanneld" --version 2>&1)${before:+; before: $PREFIX/$before}"
        for old in "$PREFIX"/versions/*; do
            [ "$old" = "$version" ] || [ "$old" = "$PREFIX/$before" ] || rm -rf "$old"
        done
    fi
}

# -- its files --------------------------------------------------------------------------------------------------------

sum() { sha256sum "$1" 2>/dev/null | cut -d' ' -f1; }
recorded() { awk -v path="$1" '$2 == path { print $1 }' "$MANIFEST" 2>/dev/null || true; }
record() {
    { awk -v path="$1" '$2 != path' "$MANIFEST" 2>/dev/null || true; echo "$(sum "$1")  $1"; } >"$WORK/manifest"
    cp "$WORK/manifest" "$MANIFEST"
}

# put SOURCE TARGET [MODE]: an edited target is kept.
put() {
    sed "s|/opt/flanneld|$PREFIX|g" "$1" >"$WORK/file"
    if [ -e "$2" ] && cmp -s "$WORK/file" "$2"; then
        [ "$(sum "$2")" = "$(recorded "$2")" ] || record "$2"
    elif [ -e "$2" ] && [ "$(sum "$2")" != "$(recorded "$2")" ]; then
        say "kept $2, which was edited (ours is $1)"
    else
        install -D -m "${3:-644}" "$WORK/file" "$2"
        record "$2"
        say "wrote $2"
    fi
}

# A host that is swapped from Go flanneld often has a unit of this name, which must not be started for ours.
refuse_foreign_unit() {
    unit=/etc/systemd/system/flanneld.service
    if [ -e "$unit" ] && ! grep -q "^ExecStart=$PREFIX/bin/flanneld" "$unit"; then
        fail "$unit is another flanneld's: stop that and rename it, such as to flanneld-go.service, or remove it"
    fi
}

install_files() {
    put "$HERE/README.md" "$PREFIX/README.md"
    put "$HERE/flanneld.env" /etc/flanneld/flanneld.env 600    # may get a password
    put "$HERE/flanneld.service" /etc/systemd/system/flanneld.service
    for file in sysctl.d/90-flanneld.conf modules-load.d/flanneld.conf systemd/network/05-flanneld.network \
        systemd/network/05-flanneld.link; do
        put "$HERE/etc/$file" "/etc/$file"
    done
    if [ -d /etc/NetworkManager ]; then
        put "$HERE/etc/NetworkManager/conf.d/90-flanneld.conf" /etc/NetworkManager/conf.d/90-flanneld.conf
    fi
    if [ -f /etc/dhcpcd.conf ] && ! grep -q '^# begin flanneld' /etc/dhcpcd.conf; then
        cat "$HERE/dhcpcd.conf" /etc/dhcpcd.conf >"$WORK/dhcpcd"
        cat "$WORK/dhcpcd" >/etc/dhcpcd.conf
        say "put denyinterfaces at the top of /etc/dhcpcd.conf"
    fi
    if [ -n "$DOCKER" ]; then
        put "$HERE/etc/systemd/system/docker.service.d/90-flanneld.conf" /etc/systemd/system/docker.service.d/90-flanneld.conf
        say "Docker takes its subnet from flanneld when it starts the next time: systemctl restart docker"
    fi
}

# -- the service ------------------------------------------------------------------------------------------------------

systemd_runs() { [ -d /run/systemd/system ]; }    # not so in a chroot or while an image is built

start() {
    systemctl enable -q flanneld
    if ! systemd_runs; then
        say "flanneld starts at boot"
        return
    fi
    # as at boot; a container has no modules of its own, and a missing one is the daemon's warning
    modprobe -q -a br_netfilter 2>/dev/null || true
    sysctl -q -p /etc/sysctl.d/90-flanneld.conf || true
    systemctl reload NetworkManager 2>/dev/null || true
    networkctl reload 2>/dev/null || true
    systemctl restart --no-block flanneld
    say "flanneld is starting: systemctl status flanneld"
}

next_step() {
    if ! systemd_runs || ! systemctl -q is-active flanneld; then
        say "to start it: edit /etc/flanneld/flanneld.env, then $0 --start"
    elif [ -n "$CHANGED" ]; then
        say "the version before runs until systemctl restart flanneld"
    fi
}

uninstall() {
    [ -f "$MANIFEST" ] || fail "nothing is installed in $PREFIX"
    if systemd_runs; then
        systemctl disable -q --now flanneld || true
    else
        systemctl disable -q flanneld || true
    fi
    while read -r digest path; do
        if [ "$(sum "$path")" = "$digest" ]; then
            rm -f "$path"
        elif [ -e "$path" ]; then
            say "kept $path, which was edited"
        fi
    done <"$MANIFEST"
    if [ -f /etc/dhcpcd.conf ]; then
        sed -i '/^# begin flanneld/,/^# end flanneld/d' /etc/dhcpcd.conf
    fi
    rm -rf "$PREFIX/versions" "$PREFIX/bin" "$MANIFEST"
    rmdir --ignore-fail-on-non-empty "$PREFIX" /etc/flanneld /etc/systemd/system/docker.service.d 2>/dev/null || true
    ! systemd_runs || systemctl daemon-reload
    say "removed; the data path and /var/lib/flanneld are as they were, so that containers keep running"
}

if [ -n "$UNINSTALL" ]; then
    uninstall
    exit 0
fi
refuse_foreign_unit
mkdir -p "$PREFIX/versions"
install_programs
install_files
! systemd_runs || systemctl daemon-reload
if [ -n "$START" ]; then
    start
else
    next_step
fi
