"""What every format promises, whichever it is."""

import json
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from hf_quant import _plugins
from hf_quant.core.scheme import BITS, QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import FormatError
from hf_quant.formats import Format, format_named, format_of
from hf_quant.methods import method

FORMATS = _plugins.names("formats")
SCHEMES = [QuantScheme(*args) for args in product(BITS, (32, 128, -1), (True, False))]
FOREIGN = [
    QuantScheme(4, 32, codebook="nf4"), QuantScheme(4, 32, symmetric=False, real_zero=True), QuantScheme(4, 32, permuted=True),
    QuantScheme(3, 128, symmetric=False, permuted=True),
]  # fmt: skip
SCHEMES += FOREIGN
HELD = [(name, scheme) for name in FORMATS for scheme in SCHEMES if format_named(name).why_not(scheme) is None]
IDS = [f"{name}-{scheme}" for name, scheme in HELD]


def quantized(scheme: QuantScheme, n: int = 40, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    if scheme.foreign:
        scale = (torch.rand(n, scheme.groups(256)) + 0.1).to(dtype)
        zero = torch.randint(scheme.qmax, scale.shape, dtype=torch.uint8)
        zero_point = None if scheme.symmetric else scale * 7.3 if scheme.real_zero else zero
        packed = torch.randint(256, (n, scheme.packed_bytes(256)), dtype=torch.uint8)
        perm = torch.randperm(256, dtype=torch.int32)[None] if scheme.permuted else None
        return in_groups(QuantizedTensor(packed, scale, zero_point, scheme, perm))
    return method("rtn", steps=0).quantize((torch.randn(n, 256) + 0.5).to(dtype), scheme, dtype)


def in_groups(tensor: QuantizedTensor) -> QuantizedTensor:
    """Columns of a group in ascending order: what a format that says only the group of a column can give back."""
    if tensor.perm is None:
        return tensor
    size = 256 // tensor.scale.shape[1]
    perm = tensor.perm.view(1, -1, size).sort(-1).values.flatten(1)
    return QuantizedTensor(tensor.qweight, tensor.scale, tensor.zero_point, tensor.scheme, perm)


def written_by(made: Format, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """What `write` gives; skips where the rows fill no whole words, which must be said."""
    n = tensor.scale.shape[0]
    try:
        return made.write(tensor)
    except FormatError as error:
        assert f"out_features {n}" in str(error)
        pytest.skip(str(error))


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_says_in_a_sentence_what_it_cannot_hold(name: str) -> None:
    made = format_named(name)
    assert isinstance(made, Format)
    assert isinstance(made.suffixes, tuple) and len(set(made.suffixes)) == len(made.suffixes)
    for scheme in SCHEMES:
        reason = made.why_not(scheme)
        assert reason is None or (len(reason.split()) > 5 and (scheme.foreign or str(scheme.bits) in reason))


@pytest.mark.parametrize("n", [1, 5, 40, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "scheme"), HELD, ids=IDS)
def test_round_trip_bit_for_bit(name: str, scheme: QuantScheme, dtype: torch.dtype, n: int) -> None:
    made, tensor = format_named(name), quantized(scheme, n, dtype)
    written = written_by(made, tensor)
    back = made.read(written, scheme)
    assert torch.equal(back.qweight, tensor.qweight) and back.qweight.dtype == torch.uint8
    assert torch.equal(back.scale, tensor.scale) and back.scale.dtype == dtype
    assert same(back.zero_point, tensor.zero_point) and back.scheme == scheme and same(back.perm, tensor.perm)


@pytest.mark.parametrize("n", [1, 5, 40, 64])
@pytest.mark.parametrize(("name", "scheme"), HELD, ids=IDS)
def test_layout_says_what_write_gives(name: str, scheme: QuantScheme, n: int) -> None:
    made = format_named(name)
    written = written_by(made, quantized(scheme, n, torch.bfloat16))
    layout = made.layout((n, 256), scheme, torch.bfloat16)
    assert {key: (tuple(t.shape), t.dtype) for key, t in written.items()} == layout
    assert set(layout) <= set(made.suffixes)


@pytest.mark.parametrize(("name", "scheme"), HELD, ids=IDS)
def test_codes_are_not_copied(name: str, scheme: QuantScheme) -> None:
    if name in ("gptq", "awq"):
        pytest.skip("it stores the transpose")
    tensor = quantized(scheme)
    written = format_named(name).write(tensor)
    assert tensor.qweight.data_ptr() in {t.data_ptr() for t in written.values()}


@pytest.mark.parametrize(("name", "scheme"), HELD, ids=IDS)
def test_a_missing_tensor_is_named(name: str, scheme: QuantScheme) -> None:
    made = format_named(name)
    written = made.write(quantized(scheme, 64))
    for key in written:
        if key == "g_idx" and not scheme.permuted:
            continue  # groups are consecutive unless it says otherwise
        with pytest.raises(FormatError, match=key if key != "g_idx" else "lie scattered|g_idx"):
            made.read({k: t for k, t in written.items() if k != key}, scheme)


@pytest.mark.parametrize(("name", "scheme"), HELD, ids=IDS)
def test_the_config_it_writes_finds_the_layers_again(name: str, scheme: QuantScheme) -> None:
    made, layers = format_named(name), ["model.layers.0.up_proj", "model.layers.1.up_proj"]
    headers = {layer: made.write(quantized(scheme, 64)) for layer in layers}
    found, reader = format_of(json.loads(json.dumps(made.config(dict.fromkeys(layers, scheme), ["lm_head"]))))
    assert found == name
    again = reader.layers(headers, lambda full: headers[full.rpartition(".")[0]][full.rpartition(".")[2]])
    assert {layer: (one.shape, one.scheme) for layer, one in again.items()} == dict.fromkeys(
        layers, ((64, 256), scheme)
    )


DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "a row short": lambda t: t[:-1],
    "flattened": lambda t: t.flatten(),
    "other dtype": lambda t: t.to(torch.int16),
    "empty": lambda t: t[:0],
    "negative": lambda t: -t.abs() - 1,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("key", ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape"])
def test_compressed_tensors_names_what_is_damaged(key: str, damage: str) -> None:
    made, scheme = format_named("compressed_tensors"), QuantScheme(4, 32, symmetric=False)
    written = made.write(quantized(scheme))
    if (damage == "negative" and key != "weight_shape") or (damage == "flattened" and key == "weight_shape"):
        return  # any bits are codes; a scale's values are checked with the checkpoint
    with pytest.raises(FormatError, match="weight_"):
        made.read(written | {key: DAMAGE[damage](written[key])}, scheme)


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "native"])
def test_no_format_of_others_loses_outliers(name: str, columns: bool) -> None:
    scheme = QuantScheme(4, 32, outliers=0.01, outlier_columns=columns)
    assert format_named(name).why_not(scheme) is not None
    with pytest.raises(FormatError):
        format_named(name).write(quantized(scheme, 64))


def test_what_a_format_cannot_hold_it_does_not_write() -> None:
    with pytest.raises(FormatError, match="3 bits"):
        format_named("compressed_tensors").write(quantized(QuantScheme(3, 32, outliers=0.01)))
