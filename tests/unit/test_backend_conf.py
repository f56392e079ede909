"""How backends read their keys."""

from __future__ import annotations

import pytest

from flanneld.errors import ConfigError
from flanneld.model.backend_conf import BackendConf


def test_keys_match_in_any_case_and_the_last_wins() -> None:
    conf = BackendConf(b'{"vni": 1, "VNI": 2, "vni": 3}')
    assert conf.integer("VNI", 1, 1, 16777215) == 3


def test_absent_and_null_give_the_default() -> None:
    conf = BackendConf(b'{"Port": null, "GBP": null, "PSK": null}')
    assert conf.integer("Port", 0, 1, 65535) == 0
    assert conf.integer("MTU", -1, 576, 65535) == -1
    assert conf.boolean("GBP", False) is False
    assert conf.boolean("Learning", True) is True
    assert conf.text("PSK", "none") == "none"


def test_values_come_out_typed() -> None:
    conf = BackendConf('{"VNI": 7, "DirectRouting": true, "Name": "n"}')
    assert conf.integer("VNI", 1, 1, 16777215) == 7
    assert conf.boolean("DirectRouting", False) is True
    assert conf.text("Name", "") == "n"


@pytest.mark.parametrize(
    ("value", "shown"),
    [("16777216", "16777216"), ("0", "0"), ("1.0", "1.0"), ('"1"', '"1"'), ("true", "true"), ("[]", "a list")],
)
def test_wrong_number_is_named_with_its_remedy(value: str, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BackendConf(f'{{"vni": {value}}}').integer("VNI", 1, 1, 16777215)
    assert str(caught.value) == f"Backend.VNI is {shown}: use a number from 1 to 16777215"


def test_wrong_flag_and_text_are_named_with_their_remedy() -> None:
    with pytest.raises(ConfigError, match=r"^Backend.GBP is 1: use true or false$"):
        BackendConf(b'{"GBP": 1}').boolean("GBP", False)
    with pytest.raises(ConfigError, match=r"^Backend.Name is 5: put it in double quotes$"):
        BackendConf(b'{"Name": 5}').text("Name", "")


def test_secret_is_never_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        BackendConf(b'{"PSK": 7355608}').text("PSK", "", secret=True)
    assert "7355608" not in str(caught.value)


def test_what_nobody_asked_for_is_left_over_as_spelt() -> None:
    conf = BackendConf(b'{"Type": "vxlan", "vni": 1, "Prot": 8472, "Unset": null}')
    conf.integer("VNI", 1, 1, 9)
    assert conf.unknown() == ("Prot",)


def test_only_an_object_will_do() -> None:
    with pytest.raises(ConfigError, match="Backend is a list"):
        BackendConf(b"[]")
