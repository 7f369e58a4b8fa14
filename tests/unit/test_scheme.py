"""Schemes: what is possible, what is refused, and the slug."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_quant.core.scheme import BITS, QuantScheme
from hf_quant.errors import SchemeError

SCHEMES = st.builds(
    QuantScheme, st.sampled_from(BITS), st.sampled_from([-1, *(2**i for i in range(4, 14))]), st.booleans()
)


@given(SCHEMES)
def test_slug_round_trip(scheme: QuantScheme) -> None:
    assert QuantScheme.parse(str(scheme)) == scheme


@given(st.text() | st.none() | st.integers())
def test_any_other_slug_is_a_scheme_error(slug: Any) -> None:
    with pytest.raises(SchemeError):
        QuantScheme.parse(slug)


@pytest.mark.parametrize("slug", ["W9A16-g128", "W4A16-g100", "W4A16-g8", "W4A16-g-2", "W4A4-g128", "W4A16-g128\n"])
def test_close_but_impossible_slugs(slug: str) -> None:
    with pytest.raises(SchemeError):
        QuantScheme.parse(slug)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"bits": 9}, "bits"),
        ({"bits": True}, "bits"),
        ({"bits": 4.0}, "bits"),
        ({"bits": "4"}, "bits"),
        ({"bits": 4, "group_size": 0}, "group_size"),
        ({"bits": 4, "group_size": 8}, "group_size"),
        ({"bits": 4, "group_size": 96}, "group_size"),
        ({"bits": 4, "group_size": None}, "group_size"),
        ({"bits": 4, "symmetric": 1}, "symmetric"),
    ],
)
def test_impossible_schemes_name_the_field(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(SchemeError, match=named):
        QuantScheme(**fields)


@given(SCHEMES, st.integers(1, 400))
def test_fitted_divides_and_never_grows(scheme: QuantScheme, words: int) -> None:
    k = 32 * words
    fitted = scheme.fitted(k)
    assert fitted.groups(k) >= 1 and fitted.groups(k) * (k if fitted.group_size == -1 else fitted.group_size) == k
    assert fitted.group_size <= scheme.group_size and (fitted.group_size == -1) == (scheme.group_size == -1)
    assert fitted.group_size == scheme.group_size or k % (2 * fitted.group_size)  # the largest that fits


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SchemeError, match="multiple of 32"):
        QuantScheme(4).fitted(100)
    with pytest.raises(SchemeError, match="does not divide"):
        QuantScheme(4, 128).groups(192)


def test_numbers_of_a_scheme() -> None:
    scheme = QuantScheme(3, 128, symmetric=False)
    assert (scheme.qmax, scheme.zero, scheme.packed_bytes(256), scheme.groups(256)) == (7, 4, 96, 2)
    assert scheme.bits_per_weight(256) == 3 + (16 + 4) / 128
    assert QuantScheme(4, -1).groups(96) == 1
