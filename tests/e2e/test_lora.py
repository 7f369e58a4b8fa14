"""PEFT on quantized models: adapters of stacked experts train, and merging into codes is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_quant import HfQuantConfig, merge_adapters, prepare_for_training
from hf_quant.errors import PlanError

from .conftest import CAUSAL, IDS

peft = pytest.importorskip("peft")
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def train(model: Any, steps: int = 1) -> Any:
    """The model after some steps; every adapter has had a gradient."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for _, p in trained], 0.5)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(float(p.grad.norm()) > 0 for n, p in trained if "lora_B" in n)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_adapters_of_stacked_experts(zoo: Any, tmp_path: Path, name: str) -> None:
    def load() -> Any:
        return CAUSAL.from_pretrained(
            zoo(name)[1], dtype=torch.float32, quantization_config=HfQuantConfig("W4A16-g32")
        )

    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], target_parameters=STACKS)
    base = load()
    before = run(base)
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(prepare_for_training(base), config).eval()
    assert (run(model) - before).abs().max() < 1e-4 * before.abs().max(), "adapters start as zero"
    after = run(train(model, steps=2))
    assert (after - before).norm() > 1e-3 * before.norm()
    with model.disable_adapter():
        assert torch.equal(run(model), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(peft.PeftModel.from_pretrained(load(), tmp_path).eval()), after)
    stored = CAUSAL.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert torch.equal(run(peft.PeftModel.from_pretrained(stored, tmp_path).eval()), after)
    with torch.no_grad(), pytest.raises(PlanError, match=r"codes.*model\.dequantize\(\)"):
        model.merge_and_unload()
    twin = peft.PeftModel.from_pretrained(load().dequantize(), tmp_path).eval()
    assert (run(twin) - after).norm() < 1e-4 * after.norm()
    assert (run(twin.merge_and_unload()) - after).norm() < 1e-4 * after.norm()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_codes_is_refused_and_changes_nothing(zoo: Any, dora: bool, safe: bool) -> None:
    config = HfQuantConfig("W4A16-g32", quantize_lm_head=True, quantize_embeddings=True)
    model = CAUSAL.from_pretrained(zoo("llama")[1], dtype=torch.float32, quantization_config=config)
    lora = peft.LoraConfig(
        r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head", "embed_tokens"], use_dora=dora
    )
    model = train(peft.get_peft_model(prepare_for_training(model), lora))
    after = run(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(PlanError, match=r"codes.*model\.dequantize\(\)"):
            merge(safe_merge=safe)
    assert torch.equal(run(model), after)


def test_the_share_that_is_trained(zoo: Any) -> None:
    folder, config = zoo("llama")[1], peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"])
    shares = []
    for quantization in ({}, {"quantization_config": HfQuantConfig("W4A16-g32")}):
        model = peft.get_peft_model(CAUSAL.from_pretrained(folder, **quantization), config)
        shares.append(model.get_nb_trainable_parameters())
    assert shares[0] == shares[1]


LINEAR = {"r": 4, "lora_alpha": 64, "target_modules": "all-linear"}
MERGED = {
    "lora": ("llama", "W4A16-g32-asym", LINEAR),
    "dora": ("llama", "W3A16-g32", LINEAR | {"use_dora": True}),
    "rslora, outliers": ("llama", "W2A16-g32-asym-o5%", LINEAR | {"use_rslora": True}),
    "conv1d, bias": ("gpt2", "W8A16-g32", LINEAR | {"lora_bias": True, "target_modules": ["c_attn", "c_fc"]}),
    "conv1d, dora": ("gpt2", "W4A16-g32", LINEAR | {"use_dora": True, "target_modules": ["c_attn", "c_fc"]}),
    "experts": ("mixtral", "W4A16-g32", {"r": 4, "lora_alpha": 64, "target_modules": [], "target_parameters": STACKS}),
    "transposed experts": ("gpt-oss", "W4A16-g32", {"r": 4, "target_modules": [], "target_parameters": STACKS}),
    "embeddings": ("llama", "W4A16-g32", {"r": 4, "lora_alpha": 64, "target_modules": ["embed_tokens", "lm_head"]}),
}


def check_lost(lost: Any, before: Any, expected: Any, made: Any) -> None:
    """Check what `merge_adapters` says it lost, given the float weights before it, with adapters, and after it."""
    assert made.keys() == expected.keys()
    for layer, share in lost.items():
        weight = layer if layer in made else f"{layer}.weight"
        change, error = (expected[weight] - other[weight] for other in (before, made))
        assert float(error.norm() / change.norm()) == pytest.approx(share, rel=1e-3)
        assert share < 1


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # of the float twin of GPT-2
@pytest.mark.parametrize("case", MERGED)
def test_merging_onto_the_grid(zoo: Any, case: str) -> None:
    name, scheme, options = MERGED[case]
    table = {"quantize_embeddings": True, "quantize_lm_head": True} if case == "embeddings" else {}

    def load() -> Any:
        config = HfQuantConfig(scheme, **table)
        return CAUSAL.from_pretrained(zoo(name)[1], dtype=torch.float32, quantization_config=config)

    def adapted(model: Any) -> Any:
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))

    untouched, lost = merge_adapters(adapted(load()))
    assert lost and set(lost.values()) == {0.0}, "adapters that change nothing change no code"
    assert torch.equal(run(untouched), run(load()))
    trained, before = train(adapted(prepare_for_training(load())), steps=2), load().dequantize().state_dict()
    twin = adapted(load().dequantize())
    twin.load_state_dict({n: p for n, p in trained.state_dict().items() if "lora_" in n}, strict=False)
    expected = twin.merge_and_unload().state_dict()
    merged, lost = merge_adapters(trained)
    check_lost(lost, before, expected, merged.dequantize().state_dict())


OTHERS = {
    "IA3Config": {"feedforward_modules": ["down_proj"]},
    "VeraConfig": {"r": 4, "target_modules": ["q_proj"]},
    "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4},
    "OFTConfig": {"oft_block_size": 8, "use_cayley_neumann": False},
    "HRAConfig": {"r": 4},
    "FourierFTConfig": {"n_frequency": 30},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_are_merged_and_unloaded(zoo: Any, kind: str) -> None:
    """PEFT assigns the weight of a layer to that same layer where it removes adapters of these kinds."""

    def load() -> Any:
        config = HfQuantConfig("W4A16-g32")
        return CAUSAL.from_pretrained(zoo("llama")[1], dtype=torch.float32, quantization_config=config)

    def adapted(base: Any) -> Any:
        torch.manual_seed(0)
        options = {"target_modules": ["q_proj", "down_proj"]} | OTHERS[kind]
        model = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", **options)).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        return model

    base = load()
    before, logits = load().dequantize().state_dict(), run(base)
    assert torch.equal(run(adapted(base).unload()), logits)
    expected = adapted(load().dequantize()).merge_and_unload(safe_merge=True).state_dict()
    merged, lost = merge_adapters(adapted(load()))
    assert not any("base_layer" in name for name, _ in merged.named_modules())
    assert lost
    check_lost(lost, before, expected, merged.dequantize().state_dict())


def test_target_parameters_of_single_matrices(zoo: Any) -> None:
    """PEFT parametrizes these weights while the model runs."""
    names = ["q_proj.weight", "down_proj.weight", "embed_tokens.weight"]

    def load() -> Any:
        config = HfQuantConfig("W4A16-g32", quantize_embeddings=True)
        return CAUSAL.from_pretrained(zoo("llama")[1], dtype=torch.float32, quantization_config=config)

    def adapted(base: Any) -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=4, task_type="CAUSAL_LM", target_modules=[], target_parameters=names, init_lora_weights=False
        )
        return peft.get_peft_model(base, config).eval()

    model, twin = adapted(prepare_for_training(load())), adapted(load().dequantize())
    before, expected = run(load()), run(twin)
    assert (expected - before).norm() > 1e-2 * before.norm()
    assert (run(model) - expected).norm() < 1e-4 * expected.norm()
    train(model)  # asserts that all adapters receive gradients


def test_target_parameters_of_conv1d_are_refused(zoo: Any) -> None:
    config = HfQuantConfig("W4A16-g32")
    model = CAUSAL.from_pretrained(zoo("gpt2")[1], dtype=torch.float32, quantization_config=config)
    adapters = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=[], target_parameters=["c_attn.weight"])
    with pytest.raises(PlanError, match="target_modules with the name of the layer"):
        run(peft.get_peft_model(model, adapters))


def test_dora_on_conv1d_compiled(zoo: Any) -> None:
    """Compiled code cannot see that PEFT asks for the weight; the layer below is square, so that a turned one has its shape."""
    config = HfQuantConfig("W4A16-g32")
    model = CAUSAL.from_pretrained(zoo("gpt2")[1], dtype=torch.float32, quantization_config=config)
    dora = {"target_modules": ["attn.c_proj"], "use_dora": True, "init_lora_weights": False}
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **dora)).eval()
    layer = model.base_model.model.transformer.h[0].attn.c_proj
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="eager")(x), layer(x))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
def test_a_table_in_floating_point_with_two_uses_is_not_merged_into(zoo: Any) -> None:
    config = HfQuantConfig("W4A16-g32")
    model = CAUSAL.from_pretrained(zoo("llama-tied")[1], dtype=torch.float32, quantization_config=config)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    )
    with pytest.raises(
        PlanError, match=r"model\.embed_tokens: lm_head has the same weight, which the adapter would change"
    ):
        merge_adapters(adapted)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
def test_a_table_with_two_uses_is_not_merged_into(zoo: Any) -> None:
    config = HfQuantConfig("W4A16-g32", quantize_lm_head=True)
    model = CAUSAL.from_pretrained(zoo("llama-tied")[1], dtype=torch.float32, quantization_config=config)
    with pytest.raises(PlanError, match="no adapters; peft"):
        merge_adapters(model)
    adapters = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    with pytest.raises(PlanError, match=r"lm_head: .* the embeddings and the output head"):
        merge_adapters(peft.get_peft_model(model, adapters))
