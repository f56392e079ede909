"""Writes the image's bill of materials: every Debian and Python package in it, with version and licence.

CycloneDX 1.5 as JSON. The tools for it on PyPI list Python packages only and bring forty more of them, for what is two
loops; scanners of whole images, such as syft, read the same two places as this does.

usage: sbom.py ROOT          (writes ROOT/usr/share/doc/flanneld/sbom.json; SOURCE_DATE_EPOCH gives its date)
"""

from __future__ import annotations

import json
import os
import re
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from email.message import Message
from email.parser import HeaderParser
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote

PLACE = "usr/share/doc/flanneld/sbom.json"


def main() -> None:
    """Write the bill of the directory that the command line names into it."""
    root = Path(sys.argv[1])
    target = root / PLACE
    moment = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
    target.write_text(json.dumps(document(root, moment), indent=1, ensure_ascii=False) + "\n")
    for path in (target, target.parent):
        os.utime(path, (moment, moment))


def document(root: Path, moment: int) -> dict[str, Any]:
    """The whole bill, for the files below a directory; the same files give the same bytes.

    Args:
        root: what will be the image's root directory.
        moment: seconds since 1970, for its date.
    """
    python = sorted(_python(root / "opt/flanneld"), key=lambda one: str(one["name"]))
    own = next(one for one in python if one["name"] == "flanneld")
    components = [*_debian(root), *(one for one in python if one is not own)]
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([own, components]))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": own | {"type": "application"},
        },
        "components": components,
        "dependencies": [{"ref": own["bom-ref"], "dependsOn": [one["bom-ref"] for one in components]}],
    }


def _debian(root: Path) -> Iterator[dict[str, Any]]:
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', (root / "etc/os-release").read_text(), re.MULTILINE))
    distro = f"{release['ID']}-{release.get('VERSION_ID', 'sid')}"
    for file in sorted((root / "var/lib/dpkg/status.d").iterdir()):
        status = HeaderParser().parsestr(file.read_text())
        name, version = status["Package"], status["Version"]
        licence = root / "usr/share/doc" / name / "copyright"
        purl = f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={status['Architecture']}&distro={distro}"
        yield _component(name, version, purl, _names_in(licence), f"/{licence.relative_to(root)}")


def _names_in(copyright_file: Path) -> str:
    """Licences by their short names; those in files of another form are only referred to.

    Source: Debian's machine-readable copyright format 1.0.
    """
    text = copyright_file.read_text(errors="replace")
    names = sorted(set(re.findall(r"^License: *(\S.*?) *$", text, re.MULTILINE))) if "Format:" in text[:400] else []
    return ", ".join(names) or "see the copyright file"


def _python(packages: Path) -> Iterator[dict[str, Any]]:
    for one in distributions(path=[str(packages)]):
        metadata = one.metadata
        name = re.sub(r"[-_.]+", "-", metadata["Name"]).lower()
        texts = ", ".join(f"/opt/flanneld/{file}" for file in _licence_files(one))
        yield _component(name, one.version, f"pkg:pypi/{name}@{one.version}", licence(metadata), texts)  # type: ignore[arg-type]


def _licence_files(one: Distribution) -> list[str]:
    names = [
        str(file) for file in one.files or () if re.search(r"dist-info/.*(licen[cs]e|copying|notice)", str(file), re.I)
    ]
    return sorted(names)


def licence(metadata: Message) -> str:
    """What a Python package says its licence is; the expression, the classifier or the first line of the free text."""
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classifiers = [line for line in metadata.get_all("Classifier", []) if line.startswith("License ::")]
    if classifiers:
        return ", ".join(sorted(line.rpartition(" :: ")[2] for line in classifiers))
    return str(metadata.get("License", "")).strip().partition("\n")[0] or "see the licence files"


def _component(name: str, version: str, purl: str, licences: str, texts: str) -> dict[str, Any]:
    component: dict[str, Any] = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    component["licenses"] = [{"license": {"name": licences}}]
    if texts:
        component["properties"] = [{"name": "flanneld:licence-text", "value": texts}]
    return component


if __name__ == "__main__":
    main()
