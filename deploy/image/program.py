"""Writes the programs in /opt/bin, under the names of Go flannel's image (contract 10.6).

Each is two lines of Python and no shell. -I -S: nothing in the environment, the working directory or a home directory
changes what is imported; -B: the image is compiled already, and read-only.

usage: program.py DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path

HEAD = '#!/usr/bin/python3 -BIS\nimport sys\nsys.path.insert(0, "/opt/flanneld")\n'
CTL = "from flanneld.ctl.main import main\nsys.exit(main({}sys.argv[1:]))\n"
PROGRAMS = {
    "flanneld": "from flanneld.cli import main\nsys.exit(main())\n",
    "flannelctl": CTL.format(""),
    "install-conf": CTL.format('["install-conf"] + '),
    "mk-docker-opts.sh": CTL.format('["docker-opts"] + '),
}


def main() -> None:
    """Write them all into the directory that the command line names."""
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True)
    for name, body in PROGRAMS.items():
        (directory / name).write_text(HEAD + body)
        (directory / name).chmod(0o755)


if __name__ == "__main__":
    main()
