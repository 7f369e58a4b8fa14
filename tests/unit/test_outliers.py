"""Weights kept in floating point: which ones, in every method, and on disk."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_quant import _plugins
from hf_quant.checkpoint.contents import Contents
from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.errors import CheckpointError, FormatError
from hf_quant.formats import format_named
from hf_quant.methods import method
from hf_quant.methods._outliers import outlier_index

KINDS = ["W3A16-g32-o2%", "W3A16-g32-asym-o2%-columns", "W8A16-g64-o1%", "W4A16-g-1-asym-o3%"]


def weights() -> tuple[Tensor, InputStats]:
    """Heavy tails, and a column that carries a lot."""
    W = torch.distributions.StudentT(3.0).sample((48, 128))
    x = torch.randn(400, 128) * torch.logspace(-1, 1, 128)[torch.randperm(128)]
    stats = InputStats.empty(128)
    stats.update(x)
    return W, stats


@pytest.mark.parametrize("name", _plugins.names("methods"))
@pytest.mark.parametrize("slug", KINDS)
def test_there_the_weight_is_what_it_was(name: str, slug: str) -> None:
    W, stats = weights()
    scheme = QuantScheme.parse(slug)
    made = method(name).quantize(W, scheme, torch.float32, stats)
    assert made.outliers is not None and made.outliers.value.shape == (48, scheme.outlier_count(128))
    index = made.outliers.index
    assert index.dtype is torch.int16 and bool((index.diff() > 0).all())
    assert index.ndim == (1 if scheme.outlier_columns else 2)
    where = index.long().expand(48, -1) if index.ndim == 1 else index.long()
    groups = made.scale.shape[1]
    zeros = made.zeros().repeat_interleave(128 // groups, 1)
    assert torch.equal(made.codes().gather(1, where), zeros.gather(1, where)), "there the codes mean zero"
    if name != "gptq":  # which moves what is left, outliers too
        torch.testing.assert_close(made.dequantize().gather(1, where), W.gather(1, where))


@pytest.mark.parametrize("name", _plugins.names("methods"))
@pytest.mark.parametrize("slug", KINDS[:2])
def test_they_save_error(name: str, slug: str) -> None:
    W, stats = weights()
    scheme = QuantScheme.parse(slug)
    plain = QuantScheme(scheme.bits, scheme.group_size, scheme.symmetric)
    judge = stats if name != "hqq" else InputStats(torch.eye(128, dtype=torch.float64), 1)  # it knows of no inputs
    lost = [judge.error(W, method(name).quantize(W, s, torch.float32, stats).dequantize()) for s in (plain, scheme)]
    assert lost[1] < 0.85 * lost[0]


def test_not_the_largest_but_those_that_save_most() -> None:
    W = torch.full((4, 64), 0.1)
    W[:, 3], W[:, 40] = 4.0, 1.0
    importance = torch.ones(64)
    importance[3] = 0.0  # large, but nothing ever arrives there
    index = outlier_index(W, QuantScheme(3, 32, outliers=0.02), torch.float32, importance, 20, 0.6)
    assert index is not None and not (index == 3).any()


def test_native_bytes() -> None:
    """Pinned: what was written once is read for ever."""
    W = torch.arange(64.0).view(2, 32) / 10
    W[0, 5], W[1, 7] = -50, 80
    made = format_named("native").write(method("rtn").quantize(W, QuantScheme(4, 32, outliers=0.01), torch.float32))
    assert made["weight_outlier_index"].tolist() == [[5], [7]] and made["weight_outlier_index"].dtype is torch.int16
    assert made["weight_outlier_value"].tolist() == [[-50.0], [80.0]]
    assert sorted(made) == ["weight", "weight_outlier_index", "weight_outlier_value", "weight_scale"]


@pytest.mark.parametrize("slug", KINDS[:2])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: t + 128, "outside of 128 columns"),
        (lambda t: t * 0 - 1, "outside"),
        (lambda t: t * 0, "must ascend"),
    ],
)
def test_hostile_indices_are_refused(slug: str, damage: object, said: str, tmp_path: Path) -> None:
    W, stats = weights()
    scheme, native = QuantScheme.parse(slug), format_named("native")
    tensors = native.write(method("rtn").quantize(W, scheme, torch.float32, stats))
    tensors["weight_outlier_index"] = damage(tensors["weight_outlier_index"])  # type: ignore[operator]
    with pytest.raises(FormatError, match=f"weight_outlier_index.*{said}"):
        native.read(tensors, scheme)
    save_file({f"a.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    contents = Contents.of(Checkpoint.of_files([tmp_path / "model.safetensors"]), native.config({"a": scheme}, []))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: a: weight_outlier_index.*{said}"):
        contents.check("a")
