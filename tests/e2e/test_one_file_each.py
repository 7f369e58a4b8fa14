"""A method, a format that is read and written, a kernel and a metric: each is one new file in its folder, and nothing else."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_quant as hq
from hf_quant import _plugins
from hf_quant.formats import Format, format_named
from hf_quant.kernels import _select
from hf_quant.kernels._interface import LinearBackend
from hf_quant.methods import Method, method

METHOD = """
from dataclasses import dataclass
from typing import ClassVar

from hf_quant.methods._nearest import nearest


@dataclass(frozen=True)
class Halved:
    calibrated: ClassVar[bool] = False

    def quantize(self, weight, scheme, dtype, stats=None):
        return nearest(weight / 2, scheme, dtype, 0, 1.0)


METHOD = Halved
"""
FORMAT = """
from typing import ClassVar

import torch

from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import FormatError
from hf_quant.formats import Layer, Traits, by_itself
from hf_quant.formats._common import FLOATS, need


class Plain(Traits):
    label: ClassVar[str] = "plain"
    methods: ClassVar[tuple[str, ...]] = ("plain",)
    saved: ClassVar[bool] = True
    converted_to: ClassVar[bool] = True
    suffixes: ClassVar[tuple[str, ...]] = ("codes", "steps")

    @classmethod
    def of(cls, config):
        return cls() if config.get("quant_method") == "plain" else None

    def config_of_plan(self, default, overrides, ignore):
        return {"quant_method": self.label, "ignore": list(ignore)}

    def why_not(self, scheme):
        return None if str(scheme) == "W8A16-g32" else "it holds W8A16-g32 only"

    def layout(self, shape, scheme, dtype):
        return {"codes": (tuple(shape), torch.uint8), "steps": ((shape[0], shape[1] // 32), dtype)}

    def write(self, tensor):
        return {"codes": tensor.qweight, "steps": tensor.scale}

    def read(self, tensors, scheme):
        n, k = need(tensors, "codes", (torch.uint8,), (None, None)).shape
        need(tensors, "steps", FLOATS, (n, k // 32))
        return QuantizedTensor(tensors["codes"], tensors["steps"], None, scheme)

    def dense(self, tensors):
        raise FormatError("every layer has codes")

    def layers(self, headers, value, called=by_itself):
        return {
            module: Layer(tuple(local["codes"].shape), QuantScheme(8, 32), local["steps"].dtype)
            for module, local in headers.items()
        }

    def config(self, schemes, left):
        return self.config_of_plan(None, {}, left)


FORMAT = Plain
"""
KERNEL = """
from typing import ClassVar

from hf_quant.core.tensor import QuantizedTensor


class Counting:
    priority: ClassVar[int] = 10**6
    repacks: ClassVar[bool] = False
    calls: ClassVar[list[int]] = []

    def why_not(self, spec):
        return None

    def prepare(self, weight, spec):
        return QuantizedTensor(weight.qweight, weight.scale, weight.zeros(), spec.scheme)

    def restore(self, prepared, spec):
        return prepared.qweight

    def linear(self, x, prepared, spec):
        self.calls.append(x.shape[-1])
        return x @ prepared.dequantize(x.dtype).T


BACKEND = Counting
"""
METRIC = """
from hf_quant.evaluation.metrics import Metric

METRIC = Metric("chance of the next token", lambda base, log_q, target: log_q.gather(-1, target[:, None])[:, 0].exp())
"""
FILES = {
    "methods": ("halved", METHOD), "formats": ("plain", FORMAT), "kernels": ("counting", KERNEL),
    "evaluation.metrics": ("chance", METRIC),
}  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[None]:
    """One file more in each of the four folders, as long as the test runs."""
    packages = {kind: importlib.import_module(f"hf_quant.{kind}") for kind in FILES}
    for kind, (name, text) in FILES.items():
        folder = tmp_path / "new" / kind
        folder.mkdir(parents=True)
        (folder / f"{name}.py").write_text(text)
        packages[kind].__path__.append(str(folder))
    _select.cache_clear()
    yield
    for kind, (name, _) in FILES.items():
        packages[kind].__path__.pop()
        sys.modules.pop(f"hf_quant.{kind}.{name}", None)
    _select.cache_clear()


@pytest.mark.usefixtures("folders")
def test_one_file_each(tiny: Path, tmp_path: Path) -> None:
    assert isinstance(method("halved"), Method) and isinstance(format_named("plain"), Format)
    done = hq.quantize(tiny, tmp_path / "q", scheme="W8A16-g32", method="halved", format="plain", max_tokens=64)
    assert done.results[0].format == "plain"
    assert done.results[0].quality is not None and 0 < done.results[0].quality.metrics["chance"].value < 1

    model = hq.load(str(done.folder))
    layer, base = (m.model.layers[0].mlp.up_proj for m in (model, AutoModelForCausalLM.from_pretrained(tiny)))
    assert torch.allclose(layer.weight.dequantize(), base.weight / 2, atol=0.01), "the method halves weights"
    kernel = _plugins.load("kernels", "counting").BACKEND
    assert isinstance(kernel(), LinearBackend)
    kernel.calls.clear()
    logits = model(torch.arange(8)[None]).logits
    assert len(kernel.calls) == 14, "the kernel runs all layers"

    model.save_pretrained(tmp_path / "again")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "again").model.layers[0].mlp.up_proj) is type(layer)
    assert torch.equal(hq.load(str(tmp_path / "again"))(torch.arange(8)[None]).logits, logits)
    native = hq.convert(done.folder, tmp_path / "native", to="native").folder
    assert torch.equal(hq.load(str(native))(torch.arange(8)[None]).logits, logits)
    back = hq.convert(native, tmp_path / "plain", to="plain").folder
    assert hq.verify(back).layers_quantized == 14 and hq.verify(back).format == "plain"
    assert "chance" in hq.evaluate(back, base=tiny, max_tokens=64).quality.metrics
