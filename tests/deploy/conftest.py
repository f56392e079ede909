"""Tests of the ways the daemon gets onto a machine; `make test-deploy` installs what they need and runs them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import debian
from tests.support.image import Workshop, build_ours
from tests.support.tell import pytest_terminal_summary, tell

__all__ = ["pytest_terminal_summary", "tell"]


@pytest.fixture(scope="session")
def workshop() -> Iterator[Workshop]:
    """Where images are built and containers run; gone at the end with all that is in it."""
    # podman wants the name of its folder to be shorter than 50 characters, which pytest's own need not be
    with Workshop(Path(tempfile.mkdtemp(prefix="flanneld-image-"))) as made:
        yield made


@pytest.fixture(scope="session")
def built(workshop: Workshop) -> list[str]:
    """Our image, built once for all tests; what was done to build it."""
    try:
        base = workshop.make_base()
    except debian.NotMadeError as error:
        pytest.skip(str(error))
    return [f"base image: {base}", f"buildah bud, in {build_ours(workshop):.0f} s"]
