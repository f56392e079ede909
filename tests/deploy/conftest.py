"""Tests of the ways the daemon gets onto a machine; `make test-deploy` installs what they need and runs them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import debian
from tests.support.image import Workshop, build_ours
from tests.support.tell import pytest_terminal_summary, tell

__all__ = ["pytest_terminal_summary", "tell"]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """Where images are built and containers run; gone at the end with all that is in it."""
    with Workshop(tmp_path_factory.mktemp("image")) as made:
        yield made


@pytest.fixture(scope="session")
def built(workshop: Workshop) -> list[str]:
    """Our image, built once for all tests; what was done to build it."""
    try:
        base = workshop.make_base()
    except debian.NotMadeError as error:
        pytest.skip(str(error))
    return [f"base image: {base}", f"buildah bud, in {build_ours(workshop):.0f} s"]
