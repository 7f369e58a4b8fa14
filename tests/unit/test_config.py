"""Fields of `HfQuantConfig`: what is unknown or contradicts another field is refused, not ignored."""

import copy
import logging
from typing import Any

import pytest
import torch

from hf_quant import HfQuantConfig
from hf_quant.errors import PlanError, SchemeError
from hf_quant.jobs.options import schemes
from hf_quant.jobs.walk import rungs


@pytest.mark.parametrize(
    ("fields", "meant"),
    [
        ({"groupsize": 64}, "group_size"), ({"load_in_4bit": True}, "bits=4"), ({"dataset": "c4"}, "calibration"),
        ({"schema": "W4A16-g32"}, "scheme"), ({"damp_percent": 0.1}, "there is scheme, bits"),
        ({"bnb_4bit_quant_type": "nf4"}, "did you mean scheme='W4A16-g64'"),
        ({"bnb_4bit_compute_dtype": "bfloat16"}, "dtype=... of from_pretrained"),
    ],
)  # fmt: skip
def test_an_unknown_field_is_refused_with_the_one_that_was_meant(fields: dict[str, Any], meant: str) -> None:
    with pytest.raises(PlanError, match=meant) as caught:
        HfQuantConfig(**fields)
    assert repr(next(iter(fields))) in str(caught.value)


@pytest.mark.parametrize("fields", [{"bits": 2}, {"group_size": 64}, {"symmetric": False}])
def test_a_field_that_contradicts_the_scheme_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(SchemeError, match=next(iter(fields))):
        HfQuantConfig("W4A16-g32", **fields)
    assert HfQuantConfig("W4A16-g32", bits=4, group_size=32, symmetric=True).scheme == "W4A16-g32"


@pytest.mark.parametrize(
    "fields",
    [{"quantize_lm_head": "no"}, {"quantize_embeddings": "false"}, {"calibration_tokens": "many"}, {"calibration_tokens": 0},
     {"overrides": {1: "W8A16-g32"}}, {"calibration_tokens": True}, {"modules_to_not_convert": [""]},
     {"calibration": ["a text"]}, {"calibration_tokens": 7}],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=next(iter(fields))):
        HfQuantConfig("W4A16-g32", **fields)


@pytest.mark.parametrize(("bits", "slug"), [(2, "-asym"), (3, "-asym"), (4, ""), (8, "")])
def test_few_bits_have_zero_points_where_nobody_says_otherwise(bits: int, slug: str) -> None:
    assert HfQuantConfig(bits=bits, group_size=64).scheme == f"W{bits}A16-g64{slug}"
    assert schemes(None, bits, 64, None) == (f"W{bits}A16-g64{slug}",)
    assert [scheme.symmetric for scheme in rungs(64, None, False)] == [True, True, False, False]
    assert HfQuantConfig(bits=bits, symmetric=True).symmetric and schemes(None, bits, None, False) == (
        f"W{bits}A16-g128",
    )


def test_a_stored_configuration_may_hold_fields_of_other_software(caplog: pytest.LogCaptureFixture) -> None:
    stored = HfQuantConfig("W3A16-g64-asym", overrides={"*.o_proj": None}).to_dict()
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        read = HfQuantConfig.from_dict(stored | {"made_by": "somebody"})
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert read.to_dict() == stored and "made_by" in caplog.text


def test_names_may_come_as_a_tuple() -> None:
    assert HfQuantConfig(modules_to_not_convert=("lm_head",)).modules_to_not_convert == ["lm_head"]


def test_the_defaults() -> None:
    assert (
        HfQuantConfig().scheme == "W4A16-g128" and HfQuantConfig(bits=8, symmetric=False).scheme == "W8A16-g128-asym"
    )


def test_bits_and_groups_are_those_of_the_scheme() -> None:
    config = HfQuantConfig.from_dict({"bits": 4, "group_size": 32}, bits=8)
    assert (config.scheme, config.bits) == ("W8A16-g32", 8)
    config.group_size, config.symmetric = 64, False
    assert config.scheme == "W8A16-g64-asym" and HfQuantConfig.from_dict(config.to_dict()) == config
    config.scheme = "W3A16-g128"
    assert (config.bits, config.group_size, config.symmetric, config.to_dict()["bits"]) == (3, 128, True, 3)
    with pytest.raises(SchemeError, match="bits"):
        config.bits = 17


def test_the_format_may_be_spelled_as_its_project_does() -> None:
    assert HfQuantConfig(format="compressed-tensors").format == "compressed_tensors"


def test_its_repr_is_one_line_with_what_is_not_the_default() -> None:
    assert repr(HfQuantConfig(bits=4)) == "HfQuantConfig('W4A16-g128')"
    shown = repr(HfQuantConfig("W8A16-g32-asym", method="gptq", overrides={"*.k_proj": None}, calibration=["private"]))
    assert shown == "HfQuantConfig('W8A16-g32-asym', method='gptq', overrides={'*.k_proj': None})"


def test_configs_are_equal_if_they_ask_for_the_same() -> None:
    """transformers' own comparison looks at no field of ours."""
    config = HfQuantConfig("W4A16-g128", overrides={"x": None})
    assert config == HfQuantConfig(bits=4, overrides={"x": None}) and config == copy.deepcopy(config)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    for other in (
        HfQuantConfig("W4A16-g128"), HfQuantConfig("W8A16-g128", overrides={"x": None}), "W4A16-g128", None,
        HfQuantConfig("W4A16-g128", overrides={"x": None}, method="gptq"),
        HfQuantConfig("W4A16-g128", overrides={"x": None}, quantize_lm_head=True),
    ):  # fmt: skip
        assert config != other
    given = HfQuantConfig(method="gptq", calibration=ids)
    assert given == copy.copy(given) and given != HfQuantConfig(method="gptq", calibration=ids.clone())


@pytest.mark.parametrize("slug", ["W8A8-threshold", "W4A16-g128-o1%"])
def test_a_scheme_that_the_format_cannot_hold_is_refused_at_once(slug: str) -> None:
    with pytest.raises(PlanError, match="format compressed_tensors cannot hold this plan"):
        HfQuantConfig(slug, format="compressed_tensors")
    HfQuantConfig(slug, format="native")


def test_digits_and_sizes_of_schemes() -> None:
    with pytest.raises(SchemeError, match="not a scheme"):
        HfQuantConfig("W\uff14A16-g128")
    with pytest.raises(SchemeError, match="power of two from 16 to 65536, got 1099511627776"):
        HfQuantConfig(group_size=2**40)
