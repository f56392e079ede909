#!/bin/sh
# Writes requirements.lock and build.lock: each Python package of the image, and of its build, with the hashes of all files
# that PyPI has of that version, for every processor and every Python from 3.11. Run it after a change of dependencies, or
# with --upgrade to take newer versions. It needs PyPI, and keeps uv in a scratch directory.
#
# usage: deploy/image/lock.sh [--upgrade]
set -eu
cd "$(dirname "$0")/../.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check uv

lock() {
    "$scratch/venv/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --only-binary :all: \
        --custom-compile-command deploy/image/lock.sh "$@"
}
lock ${1:-} pyproject.toml --output-file deploy/image/requirements.lock
printf 'setuptools>=68\nwheel\n' >"$scratch/build.in"
# uv's comments name the file that wants a package, which is a scratch one here
lock ${1:-} --no-annotate "$scratch/build.in" --output-file deploy/image/build.lock
