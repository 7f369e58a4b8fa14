"""Scales that are trained end to end, with codes that stay."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_quant import HfQuantConfig, load
from hf_quant.core.numerics import floored, levels
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.data.calibration import Calibration, calibration
from hf_quant.errors import FormatError, HfQuantError, OptionError, PlanError
from hf_quant.evaluation.yardstick import Base
from hf_quant.jobs.convert import convert
from hf_quant.jobs.quantize import quantize
from hf_quant.jobs.repair import repair
from hf_quant.jobs.tune import Tuning, _divergence, tune, tune_checkpoint, windows_of
from hf_quant.jobs.verify import verify
from hf_quant.methods import method
from hf_quant.nn import QuantLinear
from hf_quant.publish.sentences import command
from hf_quant.training.scales import product, trainable_scales
from tests import yardsticks


def plain(weight: QuantizedTensor, scale: Tensor) -> Tensor:
    """The weight ``[N, K]`` as it is defined, one group after the other."""
    codes, size = weight.codes(), weight.in_features // weight.scale.shape[-1]
    groups = []
    for g in range(weight.scale.shape[-1]):
        own = codes[:, g * size : (g + 1) * size]
        if weight.scheme.codebook is None:
            real = own.float() - weight.zeros()[:, g : g + 1].float()
        else:
            real = levels(weight.scheme.codebook, own.device)[own.int()]
        groups.append(real * scale[:, g : g + 1])
    made = torch.cat(groups, 1)
    if weight.outliers is not None:
        made = made.scatter_add(1, weight.outliers.index.long(), weight.outliers.value.float())
    return made if weight.perm is None else made[:, weight.perm[0].argsort()]


def kinds() -> dict[str, QuantizedTensor]:
    torch.manual_seed(0)
    weight, scheme = torch.randn(6, 64), QuantScheme.parse("W3A16-g32-asym")
    rounded = method("rtn").quantize(weight, scheme, torch.float32)
    book, order = replace(scheme, bits=4, symmetric=True, codebook="nf4"), torch.randperm(64)[None].int()
    codes = QuantizedTensor.from_codes(torch.randint(0, 16, (6, 64), dtype=torch.uint8), torch.rand(6, 2) + 0.1,
                                       torch.zeros(6, 2), book)  # fmt: skip
    return {
        "zero points": rounded, "codebook": codes,
        "outliers": method("rtn").quantize(weight, replace(scheme, outliers=0.05), torch.float32),
        "permuted": replace(rounded, perm=order, scheme=replace(scheme, permuted=True)),
    }  # fmt: skip


@pytest.mark.parametrize("kind", kinds())
def test_gradients_are_those_of_the_plain_product(kind: str) -> None:
    weight = kinds()[kind]
    found = []
    for fast in (True, False):
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        scale = weight.scale.clone().requires_grad_()
        y = product(x, replace(weight, scale=scale)) if fast else x @ plain(weight, scale).T
        y.sin().sum().backward()  # type: ignore[no-untyped-call]
        found.append([y.detach(), x.grad, scale.grad])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return yardsticks.make("outliers", tmp_path_factory.mktemp("base"))


def text(base: Base, file: str) -> Any:
    return calibration(str(Path(base.model) / file), yardsticks.tokenizer(), 64, 2048, 512)


def divergence(model: Any, base: Any, ids: Tensor) -> float:
    with torch.no_grad():
        log_p, log_q = (each(ids).logits.float().log_softmax(-1) for each in (base, model))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def test_a_checkpoint_comes_closer_to_its_base(source: Path, tmp_path: Path) -> None:
    """On text that was neither tuned on nor held out of it, with the same codes; links to its files stay as they were."""
    base, folder = Base(str(source)), tmp_path / "q"
    load(str(source), quantization_config=HfQuantConfig("W2A16-g32-asym")).save_pretrained(folder)
    os.link(folder / "model.safetensors", tmp_path / "linked.safetensors")
    said: list[str] = []
    tuned = tune_checkpoint(folder, base, text(base, "calibration.txt"), Tuning(3, 0.01), {}, said.append)
    assert tuned.after < tuned.before and len(said) >= 3 and tuned.skipped == 0
    before, after = load_file(tmp_path / "linked.safetensors"), load_file(folder / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("weight_scale")}
    ids, floats = text(base, "heldout.txt").ids, base.load(torch.float32)
    now = divergence(load(str(folder), dtype=torch.float32), floats, ids)
    (folder / "model.safetensors").unlink()
    os.link(tmp_path / "linked.safetensors", folder / "model.safetensors")
    assert now < 0.9 * divergence(load(str(folder), dtype=torch.float32), floats, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_stored_is_what_was_measured(source: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Every tensor keeps its dtype, and the checkpoint read again diverges by the very number that was kept."""
    base, folder = Base(str(source)), tmp_path / "q"
    load(str(source), quantization_config=HfQuantConfig("W2A16-g32-asym"), dtype=dtype).save_pretrained(folder)
    types = {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}
    assert {kind for name, kind in types.items() if name.endswith("_scale")} == {dtype}
    tuned = tune_checkpoint(folder, base, text(base, "calibration.txt"), Tuning(1, 0.01), {}, lambda _: None)
    assert {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()} == types
    reference = base.reference_on(windows_of(text(base, "calibration.txt")), noise=False)
    again = load(str(folder), dtype=torch.float32)
    with trainable_scales(again):
        assert _divergence(again, reference) == tuned.after < tuned.before


def test_a_gptq_checkpoint_is_repaired(source: Path, tmp_path: Path) -> None:
    """Its codes and everything else stay; its scales say what the base says, and the folder says by how much."""
    made, gptq, out = tmp_path / "made", tmp_path / "gptq", tmp_path / "out"
    load(str(source), quantization_config=HfQuantConfig("W2A16-g32-asym")).save_pretrained(made)
    convert(str(made), str(gptq), to="gptq")
    done = repair(gptq, out, base=str(source), calibration_tokens=2048, passes=2)
    assert done.source == "gptq" and done.after < done.before and verify(str(out)).to_dict()
    written = json.loads((out / "conversion.json").read_text())
    assert written["tuned"]["kl_after"] == done.after and "calibration" in written
    before, after = load_file(made / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith("weight_scale") for name in changed)
    with pytest.raises(OptionError, match="--passes 0"):
        repair(gptq, tmp_path / "again", base=str(source), passes=0)
    with pytest.raises(HfQuantError, match="quantized already"):
        repair(gptq, tmp_path / "again", base=str(made))
    other = tmp_path / "other"
    shutil.copytree(source, other)
    config = json.loads((other / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": 5.0}
    for field, value in (
        ("num_hidden_layers", 7),
        ("intermediate_size", 96),
        ("rope_parameters", rope),
        ("hidden_act", "relu"),
    ):
        (other / "config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(PlanError, match=f"--base .*other: {field}.* is .*, that of .*gptq is"):
            repair(gptq, tmp_path / "again", base=str(other))
    assert not list(tmp_path.glob(".*"))


def test_experts_that_lie_one_by_one_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    base = yardsticks.make("moe", tmp_path / "moe")
    load(str(base), quantization_config=HfQuantConfig("W4A16-g32")).save_pretrained(tmp_path / "made")
    with pytest.raises(FormatError, match="experts that lie in the file one by one are not repaired"):
        repair(tmp_path / "made", tmp_path / "out", base=str(base), calibration_tokens=2048)


def test_nothing_that_is_worse_is_kept_and_nothing_is_left_behind(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_QUANT_BACKEND", "dequant")  # compiled products round otherwise, and so would activations
    base = Base(str(source))
    model = load(str(source), quantization_config=HfQuantConfig("W4A8-g32"), dtype=torch.float32)
    ids = text(base, "heldout.txt").ids[:4]
    reference = base.reference_on(windows_of(text(base, "calibration.txt")), noise=False)
    with torch.no_grad():
        before = model(ids).logits
        with trainable_scales(model):
            assert (model(ids).logits - before).norm() < 0.02 * before.norm()  # some activations round the other way
    tuned = tune(model, reference, Tuning(1, 3.0), lambda _: None)
    assert tuned.after == tuned.before
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "scale" in name)
    with pytest.raises(HfQuantError, match="no quantized layers"):
        tune(base.load(torch.float32), reference, Tuning(), lambda _: None)


@pytest.mark.parametrize(("enough", "passes"), [(450, 4), (60, 2), (5, 1)])
def test_a_long_text_is_seen_less_often(
    enough: int, passes: int, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """28 windows are trained on; what was done is what the recipe says."""
    monkeypatch.setattr("hf_quant.jobs.tune.ENOUGH", enough)
    base, said = Base(str(source)), list[str]()
    model = load(str(source), quantization_config=HfQuantConfig("W4A16-g32"), dtype=torch.float32)
    reference = base.reference_on(windows_of(text(base, "calibration.txt")), noise=False)
    tuned = tune(model, reference, Tuning(), said.append)
    assert len(said) == tuned.to_dict()["epochs"] == passes and f"pass {passes} of {passes}" in said[-1]


def test_scales_are_those_of_a_naive_loop(source: Path) -> None:
    """One step for every window that is not held out, through the plain product of every layer."""
    base = Base(str(source))
    quantized = load(str(source), quantization_config=HfQuantConfig("W3A16-g32-asym"), dtype=torch.float32)
    ids = text(base, "calibration.txt").ids[:6]
    reference = base.reference_on(windows_of(Calibration(ids, "text", [])), noise=False)
    layers = {name: module for name, module in quantized.named_modules() if isinstance(module, QuantLinear)}
    weights = {name: module.quantized_weight() for name, module in layers.items()}
    weights = {name: replace(w, scale=w.scale.clone()) for name, w in weights.items()}  # the model's own, uncompiled
    factors = {name: torch.ones_like(weight.scale.float(), requires_grad=True) for name, weight in weights.items()}
    plainly, optimizer = base.load(torch.float32), torch.optim.Adam(factors.values(), betas=(0.9, 0.95))
    pieces = {rows.inputs["input_ids"].shape[0] for rows in reference.pieces}
    order = [w for n in torch.randperm(len(reference), generator=torch.Generator().manual_seed(0)).tolist()
             for w in range(4) if reference.pieces[n].first <= w < reference.pieces[n].first + max(pieces)]  # fmt: skip
    for step, window in enumerate(order):
        real = {
            f"{n}.weight": plain(w, floored(w.scale.float() * factors[n], w.scale.dtype)) for n, w in weights.items()
        }
        number = next(
            n for n, piece in enumerate(reference.pieces) if piece.first <= window < piece.first + len(piece.scored)
        )
        own = slice(63 * (window - reference.pieces[number].first), 63 * (window - reference.pieces[number].first + 1))
        base_says = {name: tensor[own] for name, tensor in vars(reference[number].base).items()}
        p = torch.zeros(63, 512).scatter_(-1, base_says["top_ids"].long(), base_says["top"].exp().float())
        share = base_says["tail_mass"].exp().float()[:, None] / base_says["tail_ids"].shape[-1]
        p.scatter_add_(-1, base_says["tail_ids"].long(), share.expand(base_says["tail_ids"].shape))
        log_q = torch.func.functional_call(plainly, real, (ids[window : window + 1],)).logits.log_softmax(-1)[:, :-1]
        optimizer.zero_grad()
        (-(p * log_q[0]).sum(-1).mean()).backward()
        optimizer.param_groups[0]["lr"] = (
            0.1 * min(1, (step + 1) / 10) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / 4)) / 2)
        )
        optimizer.step()
    assert len(order) == 4
    tuned = tune(quantized, reference, Tuning(1, 0.1), lambda _: None)
    assert tuned.after < tuned.before
    for name, module in layers.items():
        start, wanted = weights[name].scale.float(), weights[name].scale.float() * factors[name].detach()
        off = module.quantized_weight().scale.float() - wanted
        assert (
            off.norm() < 0.3 * (wanted - start).norm()
        )  # the cache holds the likely tokens and a sample of the others


def test_quantizing_tunes_what_it_has_learned(source: Path, tmp_path: Path) -> None:
    """The same codes with and without; the recipe says what was done; only where codes were learned."""
    recipes, tensors = {}, {}
    for tuned in (True, False):
        out = tmp_path / str(tuned)
        quantize(source, out, scheme="W2A16-g32-asym", method="learned", epochs=1, calibration_tokens=2048,
                 max_tokens=512, max_kl=100, tune=tuned)  # fmt: skip
        recipes[tuned] = json.loads((out / "recipe.json").read_text())
        tensors[tuned] = {n: t for file in sorted(out.glob("*.safetensors")) for n, t in load_file(file).items()}
    assert recipes[True]["tuned"]["kl_after"] < recipes[True]["tuned"]["kl_before"] and "tuned" not in recipes[False]
    assert "--epochs 1" in command(recipes[True]) and "--no-tune" not in command(recipes[True])
    assert command(recipes[False]).endswith("--epochs 1 --no-tune")
    changed = {name for name in tensors[True] if not torch.equal(tensors[True][name], tensors[False][name])}
    assert changed and all(name.endswith("weight_scale") for name in changed)
