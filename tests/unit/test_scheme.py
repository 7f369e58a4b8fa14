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
ANY_WIDTH = st.integers(1, 12800)


@given(SCHEMES, ANY_WIDTH)
def test_slug_round_trip(scheme: QuantScheme, k: int) -> None:
    for made in (scheme, scheme.fitted(k)):
        assert QuantScheme.parse(str(made)) == made


@given(st.text() | st.none() | st.integers())
def test_any_other_slug_is_a_scheme_error(slug: Any) -> None:
    try:
        scheme = QuantScheme.parse(slug)
    except SchemeError:
        return
    assert str(scheme) == slug  # hypothesis draws strings of the code, too, which may be slugs


@pytest.mark.parametrize(
    "slug",
    ["W9A16-g128", "W4A16-g100", "W4A16-g8", "W4A16-g-2", "W4A4-g128", "W4A16-g128\n", "W8A8-pad0", "W8A8-pad32"],
)
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


@given(SCHEMES, ANY_WIDTH)
def test_fitted_divides_and_never_grows(scheme: QuantScheme, k: int) -> None:
    fitted = scheme.fitted(k)
    columns, size = fitted.columns(k), fitted.group_size
    assert columns % 32 == 0 and 0 <= columns - k == fitted.padding < 32
    assert fitted.groups(k) >= 1 and fitted.groups(k) * (columns if size == -1 else size) == columns
    assert size <= scheme.group_size and (size == -1) == (scheme.group_size == -1)
    assert size == scheme.group_size or columns % (2 * size)  # the largest that fits
    assert fitted.stored.groups(columns) == fitted.groups(k) and fitted.fitted(k) == fitted


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SchemeError, match="blocks of Q4_K"):
        QuantScheme.of_blocks("Q4_K").fitted(100)
    with pytest.raises(SchemeError, match="does not divide"):
        QuantScheme(4, 128).groups(192)


def test_numbers_of_a_scheme() -> None:
    scheme = QuantScheme(3, 128, symmetric=False)
    assert (scheme.qmax, scheme.zero, scheme.packed_bytes(256), scheme.groups(256)) == (7, 4, 96, 2)
    assert scheme.bits_per_weight(256) == 3 + (16 + 4) / 128
    assert QuantScheme(4, -1).groups(96) == 1
