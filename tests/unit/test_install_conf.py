"""``flannelctl install-conf``, Go flannel's install-conf (contract 10.5)."""

from __future__ import annotations

from pathlib import Path

import pytest

from flanneld.ctl.main import main


def install(*words: object) -> int:
    return main(["install-conf", *map(str, words)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "cni-conf.json"
    file.write_bytes(b'{"name": "cbr0"}\n\xff')
    file.chmod(0o640)
    return file


@pytest.fixture
def net_d(tmp_path: Path) -> Path:
    (tmp_path / "net.d").mkdir()
    return tmp_path / "net.d"


def test_content_and_mode_are_those_of_the_source(source: Path, net_d: Path) -> None:
    target = net_d / "10-flannel.conflist"
    target.write_text("old")
    target.chmod(0o600)
    assert install(source, target) == 0
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_mode & 0o7777 == 0o640
    assert list(net_d.iterdir()) == [target], "no temporary file stays"


def test_a_link_to_the_source_is_followed_and_one_at_the_destination_replaced(source: Path, net_d: Path) -> None:
    # a ConfigMap's files are links
    (net_d / "config").symlink_to(source)
    target = net_d / "10-flannel.conflist"
    target.symlink_to(net_d / "elsewhere")
    assert install(net_d / "config", target) == 0
    assert not target.is_symlink()
    assert target.read_bytes() == source.read_bytes()
    assert not (net_d / "elsewhere").exists()


def test_a_reader_of_the_old_file_keeps_it_whole(source: Path, net_d: Path) -> None:
    target = net_d / "10-flannel.conflist"
    target.write_text("old")
    with target.open() as reader:
        assert install(source, target) == 0
        assert reader.read() == "old"


@pytest.mark.parametrize("words", [[], ["a"], ["a", "b", "c"]], ids=len)
def test_other_than_two_words_gives_usage_and_status_1(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert install(*words) == 1
    assert capsys.readouterr().err == "usage: install-conf <src> <dest>\n"


def test_no_source_is_a_sentence_and_leaves_the_destination(
    tmp_path: Path, net_d: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = net_d / "10-flannel.conflist"
    target.write_text("old")
    assert install(tmp_path / "none", target) == 1
    assert capsys.readouterr().err == f"flannelctl: read {tmp_path}/none: No such file or directory\n"
    assert target.read_text() == "old"


def test_no_directory_is_an_error_and_makes_none(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install(source, tmp_path / "missing" / "x.conf") == 1
    assert "missing/x.conf: No such file or directory" in capsys.readouterr().err
    assert not (tmp_path / "missing").exists()


def test_a_directory_at_the_destination_stays_and_nothing_is_left(
    source: Path, net_d: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (net_d / "x.conf").mkdir()
    assert install(source, net_d / "x.conf") == 1
    assert "a directory is in its place" in capsys.readouterr().err
    assert list(net_d.iterdir()) == [net_d / "x.conf"]
