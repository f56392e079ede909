#!/bin/sh
# Asks PyPI's list of advisories about each package of the image, in the version and with the hashes that are locked. That
# list is on the network, so this is no part of the tests; CI runs it daily, because advisories come without a commit.
# What needs no network is tested with every commit: tests/unit/test_dependencies.py, tests/deploy/test_image_lock.py.
#
# usage: deploy/audit.sh          status 0: no advisory; 1: there is one, or a package could not be asked about
set -eu
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check pip-audit

failed=0
for lock in requirements build; do
    # without dependency resolution: a lock is complete, and an audit must not run what it audits
    "$scratch/venv/bin/pip-audit" --require-hashes --disable-pip --progress-spinner off \
        -r "deploy/image/$lock.lock" >"$scratch/found" 2>"$scratch/said" || failed=1
    cat "$scratch/found" "$scratch/said"
    # a package that PyPI did not tell about is reported as skipped and counts as good; here it does not
    if grep -q "could not be audited" "$scratch/found"; then
        echo "audit: advisories cannot be read for some packages of $lock.lock, is pypi.org reachable?" >&2
        failed=1
    fi
done
exit $failed
