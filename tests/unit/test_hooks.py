"""Every private name of other packages that this one uses: one test for each, so that the failing test says which one broke."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.utils.hub import PushToHubMixin

import hf_quant
from hf_quant.core import private_torch
from hf_quant.core.scheme import QuantScheme
from hf_quant.errors import KernelError
from hf_quant.hf import _hooks
from hf_quant.nn import QuantLinear
from hf_quant.nn import _hooks as nn_hooks

HOUSE = Path(hf_quant.__file__).parent
HOOKS = ("hf/_hooks.py", "nn/_hooks.py", "core/private_torch.py")
MODULES = (_hooks, nn_hooks, private_torch)


@functools.cache
def model() -> Any:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
    )
    with torch.device("meta"):
        return _hooks.build(LlamaForCausalLM, config, torch.bfloat16)


# -- the list is complete ---------------------------------------------------------------------------------------------


def test_every_hook_has_a_test() -> None:
    own = {name for module in MODULES for name, member in vars(module).items()
           if inspect.isfunction(member) and member.__module__ == module.__name__ and not name.startswith("_")}  # fmt: skip
    assert {f"test_{name}" for name in own} <= set(globals()) and len(own) > 20


class Private(ast.NodeVisitor):
    """Attributes, strings of attributes and imports with a leading underscore."""

    def __init__(self) -> None:
        self.used: dict[str, int] = {}
        self.defined: set[str] = set()

    def visit_FunctionDef(self, node: Any) -> None:
        self.defined.add(node.name)
        self.generic_visit(node)

    visit_ClassDef = visit_FunctionDef

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.defined.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
            self.defined.add(node.attr)
        self.used.setdefault(node.attr, node.lineno)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr", "setattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant):
                self.used.setdefault(str(name.value), node.lineno)
        self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if not str(node.module).startswith("hf_quant"):
            for name in [*str(node.module).split("."), *(alias.name for alias in node.names)]:
                self.used.setdefault(name, node.lineno)


# what subclasses of `nn.Module` are documented or customary to use, and operations of torch that a kernel asks for
KNOWN = {"_parameters", "_apply", "_save_to_state_dict", "_load_from_state_dict", "_fields", "_getframe", "__future__"}


def private_names(root: Path) -> Iterator[tuple[str, str]]:
    files = {path: Private() for path in root.rglob("*.py")}
    for path, visitor in files.items():
        visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
    ours = {name for visitor in files.values() for name in visitor.defined}
    for path, visitor in files.items():
        for name, line in visitor.used.items():
            if name.startswith("_") and not name.startswith("__") and name not in ours | KNOWN:
                yield path.relative_to(root).as_posix(), f"{name} (line {line})"


def test_private_names_of_other_packages_stand_in_these_files_alone(tmp_path: Path) -> None:
    assert [(file, name) for file, name in private_names(HOUSE) if file not in HOOKS] == []
    (tmp_path / "bad.py").write_text(
        "from torch.utils import _pytree\nx = model._hf_hook\ny = getattr(model, '_auto_class', None)\nself._own = self._own\n"
    )
    assert sorted(name.split()[0] for _, name in private_names(tmp_path)) == ["_auto_class", "_hf_hook", "_pytree"]


# -- transformers, accelerate, huggingface_hub ------------------------------------------------------------------------


def test_patterns_of() -> None:
    sources, targets = ["experts.*.gate_proj.weight", "experts.*.up_proj.weight"], ["experts.gate_up_proj"]
    converter = WeightConverter(sources, targets, [MergeModulelist(), Concatenate(1)])
    assert _hooks.patterns_of(converter) == (sources, targets)


def test_conversions_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model().config.save_pretrained(tmp_path)
    small = LlamaForCausalLM(AutoConfig.from_pretrained(tmp_path))
    small.save_pretrained(tmp_path)
    assert _hooks.conversions_of(small) == []
    small._weight_conversions = [renaming := object()]
    assert _hooks.conversions_of(small) == [renaming]


def test_set_conversions(tmp_path: Path) -> None:
    """What is set is what ``save_pretrained`` undoes."""
    from transformers.core_model_loading import WeightRenaming, revert_weight_conversion

    network = SimpleNamespace(config=model().config, base_model_prefix="model")
    _hooks.set_conversions(network, [WeightRenaming("elsewhere.weight", "lm_head.weight")])
    assert list(revert_weight_conversion(network, {"lm_head.weight": torch.ones(1)})) == ["elsewhere.weight"]


def test_download_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model().config.save_pretrained(tmp_path)
    LlamaForCausalLM(model().config).save_pretrained(tmp_path)
    seen = []
    original = LlamaForCausalLM.__init__

    def look(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(_hooks.download_options())
        original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", look)
    LlamaForCausalLM.from_pretrained(tmp_path, token="secret", local_files_only=True)
    assert seen[0]["token"] == "secret" and seen[0]["local_files_only"] is True
    assert _hooks.download_options() == {}


def test_key_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LlamaForCausalLM(model().config).save_pretrained(tmp_path)
    seen = []
    original = LlamaForCausalLM.__init__

    def look(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(_hooks.key_mapping())
        original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", look)
    LlamaForCausalLM.from_pretrained(tmp_path, key_mapping={"one": "another"})
    assert seen == [{"one": "another"}] and _hooks.key_mapping() == {}


def test_build() -> None:
    assert model().dtype is torch.bfloat16 and model().device.type == "meta"


def test_modules_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hasattr(PreTrainedModel, "_keep_in_fp32_modules") and hasattr(
        PreTrainedModel, "_keep_in_fp32_modules_strict"
    )
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", {"wo"})
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["norm"])
    assert _hooks.modules_in_float32(model()) >= {"wo", "norm"} or _hooks.modules_in_float32(LlamaForCausalLM) == {
        "wo",
        "norm",
    }


def test_stays_in_float32() -> None:
    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = T5ForConditionalGeneration(config).to(dtype)
        assert model._get_dtype_plan(dtype) == ({"wo": torch.float32} if dtype == torch.float16 else {})
        for name, _ in model.named_parameters():
            assert _hooks.stays_in_float32(model, name, dtype) == (".wo." in name and dtype == torch.float16)


def test_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hasattr(PreTrainedModel, "_keys_to_ignore_on_load_missing") and _hooks.may_be_missing(PreTrainedModel) == []
    monkeypatch.setattr(PreTrainedModel, "_keys_to_ignore_on_load_missing", ["a"])
    assert _hooks.may_be_missing(PreTrainedModel) == ["a"]


def test_computed() -> None:
    """Marian's sinusoids are not saved."""
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 9, "pad_token_id": 0}
    config = MarianConfig(**sizes, encoder_attention_heads=1, decoder_attention_heads=1, max_position_embeddings=4)
    name = "model.encoder.embed_positions.weight"
    with torch.device("meta"):
        empty = MarianMTModel(config)
    made = _hooks.computed(empty, name)
    assert made is not None and torch.equal(made, MarianMTModel(config).get_parameter(name))
    assert _hooks.computed(empty, "model.shared.weight") is None
    empty._keys_to_ignore_on_load_missing = ["shared.weight"]
    assert _hooks.computed(empty, "model.shared.weight") is None, "drawn at random"


def test_may_be_unexpected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        hasattr(PreTrainedModel, "_keys_to_ignore_on_load_unexpected")
        and _hooks.may_be_unexpected(PreTrainedModel) == []
    )
    monkeypatch.setattr(PreTrainedModel, "_keys_to_ignore_on_load_unexpected", ["a"])
    assert _hooks.may_be_unexpected(PreTrainedModel) == ["a"]


def test_attention_of() -> None:
    assert _hooks.attention_of(model().config) == "sdpa"


def test_takes_static_cache() -> None:
    assert hasattr(PreTrainedModel, "_can_compile_fullgraph")
    assert _hooks.takes_static_cache(model()) and not _hooks.takes_static_cache(torch.nn.Linear(1, 1))


def test_has_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PreTrainedModel._hf_peft_config_loaded is False and not _hooks.has_adapters(model())
    monkeypatch.setattr(LlamaForCausalLM, "_hf_peft_config_loaded", True)
    assert _hooks.has_adapters(model())


def test_moves_weights() -> None:
    layer = nn.Linear(2, 2)
    assert not nn_hooks.moves_weights(layer)
    for hook in (ModelHook(), AlignDevicesHook("cpu"), CpuOffload("cpu")):
        add_hook_to_module(layer, hook)
        assert not nn_hooks.moves_weights(layer)
    add_hook_to_module(layer, AlignDevicesHook("cpu", offload=True), append=True)
    assert nn_hooks.moves_weights(layer)
    assert nn_hooks.FORWARD in vars(layer) and nn_hooks.HOOK in vars(layer)
    remove_hook_from_module(layer)
    assert not nn_hooks.moves_weights(layer) and nn_hooks.HOOK not in vars(layer)


def test_replaced() -> None:
    layer = nn.Linear(2, 2)
    with _hooks.replaced(layer, "forward", lambda x: x):
        assert layer(3) == 3
    assert "forward" not in vars(layer)
    layer.forward = accelerates = lambda x: -x  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError), _hooks.replaced(layer, "forward", lambda x: x):
        raise ZeroDivisionError
    assert layer.forward is accelerates


def test_refuse_uploads(tmp_path: Path) -> None:
    """Installed by `hf.publishing`; every ``push_to_hub`` of transformers goes through the function that it wraps."""
    assert PushToHubMixin._upload_modified_files.__module__ == _hooks.__name__
    assert "_upload_modified_files(" in inspect.getsource(PushToHubMixin.push_to_hub)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "hf_quant"}}')
    with pytest.raises(hf_quant.errors.PushError, match="unmeasured"):
        PushToHubMixin()._upload_modified_files(tmp_path, "a/b", {})


def test_client_factory() -> None:
    before = _hooks.client_factory()
    try:
        huggingface_hub.set_client_factory(factory := lambda: before())
        assert _hooks.client_factory() is factory
    finally:
        huggingface_hub.set_client_factory(before)


def test_mark_initialized() -> None:
    """A marked module is not given random numbers."""
    network = LlamaForCausalLM(model().config)
    head = network.lm_head
    nn.init.ones_(head.weight)
    nn_hooks.mark_initialized(head)
    nn_hooks.mark_initialized(head.weight, nn_hooks.AWAITED)
    network.init_weights()
    assert bool((head.weight == 1).all())


def test_is_initialized(tmp_path: Path) -> None:
    """The loader marks what it has filled."""
    LlamaForCausalLM(model().config).save_pretrained(tmp_path)
    assert all(nn_hooks.is_initialized(p) for p in LlamaForCausalLM.from_pretrained(tmp_path).parameters())
    assert not nn_hooks.is_initialized(nn.Linear(2, 2).weight)


def _experts() -> Any:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    return MixtralExperts(MixtralConfig(hidden_size=8, intermediate_size=8, num_local_experts=2))


def test_has_gate_function() -> None:
    assert nn_hooks.has_gate_function(_experts()) and not nn_hooks.has_gate_function(nn.Linear(2, 2))


def test_apply_gate() -> None:
    y = torch.randn(3, 16)
    torch.testing.assert_close(nn_hooks.apply_gate(_experts(), y), nn.functional.silu(y[:, :8]) * y[:, 8:])


# -- PyTorch ----------------------------------------------------------------------------------------------------------

SEEN_IN_TORCH = (
    "_C._len_torch_dispatch_stack", "_C._functorch.peek_interpreter_stack", "_C._is_tracing",
    "_C._dynamo.guards._empty_strided_cpu", "autograd.forward_ad._current_level", "cpu._is_avx512_bf16_supported",
    "cpu._is_vnni_supported", "cpu._is_amx_tile_supported",
    "ops.aten._convert_weight_to_int4pack_for_cpu", "ops.aten._weight_int4pack_mm_for_cpu",
    "Tensor._make_wrapper_subclass", "utils._pytree.tree_map", "utils._pytree.tree_leaves",
)  # fmt: skip


@pytest.mark.parametrize("path", SEEN_IN_TORCH)
def test_private(path: str) -> None:
    assert private_torch.private(path) is not None
    assert private_torch.private(f"{path}.absent") is None


def test_may_skip_dispatcher() -> None:
    assert private_torch.may_skip_dispatcher(torch.ones(1))
    assert not private_torch.may_skip_dispatcher(torch.ones(1, requires_grad=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch itself
def test_refuse_forward_mode() -> None:
    private_torch.refuse_forward_mode(torch.ones(1))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(1), torch.ones(1))
        with pytest.raises(KernelError, match="forward-mode differentiation"):
            private_torch.refuse_forward_mode(dual)


def test_cpu_has() -> None:
    assert private_torch.cpu_has("vnni") is torch.cpu._is_vnni_supported()
    assert not private_torch.cpu_has("no_such_instruction")


def test_written_arguments() -> None:
    a, b = torch.ones(1), torch.ones(1)
    written = private_torch.written_arguments
    assert [id(t) for t in written(torch.ops.aten.add_.Tensor, (a, b), {})] == [id(a)]
    assert [id(t) for t in written(torch.ops.aten.add.out, (a, b), {"out": b})] == [id(b)]
    assert written(torch.ops.aten.add.Tensor, (a, b), {}) == []


def test_tree_leaves() -> None:
    assert private_torch.tree_leaves(((1, [2]), {"a": 3})) == [1, 2, 3]


def test_tree_map_only() -> None:
    assert private_torch.tree_map_only(int, lambda n: n + 1, ((1, ["b"]), {"a": 3.0})) == ((2, ["b"]), {"a": 3.0})


def _without(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`private_torch` made again, in a PyTorch that lacks a name."""
    owner, _, name = path.rpartition(".")
    monkeypatch.delattr(private_torch.private(owner), name)
    spec = importlib.util.spec_from_file_location("without", private_torch.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "path", [path for path in SEEN_IN_TORCH if not path.startswith(("Tensor.", "ops."))]
)  # not deletable
def test_pytorch_without_one_of_them(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatcher is then always asked, memory comes the usual way, and nested arguments are walked through here."""
    module = _without(path, monkeypatch)
    name = path.rpartition(".")[2]
    dispatcher = ("_len_torch_dispatch_stack", "peek_interpreter_stack", "_is_tracing", "_current_level")
    assert module.may_skip_dispatcher(torch.ones(1)) == (name not in dispatcher)
    empty = module.empty_on_cpu((2, 3), (3, 1), torch.bfloat16)
    assert empty.shape == (2, 3) and empty.stride() == (3, 1) and empty.dtype is torch.bfloat16
    assert module.tree_leaves(((1, [2]), {"a": 3})) == [1, 2, 3]
    assert module.tree_map_only(int, lambda n: n + 1, ((1, ["b"]), {"a": 3})) == ((2, ["b"]), {"a": 4})
    assert isinstance(module.cpu_has("avx512_bf16", "vnni"), bool)


def test_operations_without_a_schema() -> None:
    """Those whose names end in an underscore are then taken to write to their first argument."""

    class Operation:
        def __init__(self, name: str) -> None:
            self.name = name

        def __str__(self) -> str:
            return self.name

    assert private_torch.written_arguments(Operation("aten.add_.Tensor"), (1, 2), {}) == [1]
    assert private_torch.written_arguments(Operation("aten.add.Tensor"), (1, 2), {}) == []


def test_a_weight_without_wrapper_subclasses(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer()
    shown = layer.weight
    monkeypatch.setattr("hf_quant.nn._outside.wrapper_subclass", None)
    assert type(layer.weight) is torch.Tensor and layer.weight.dtype is shown.dtype
    assert torch.equal(layer.weight, shown + 0)


def _layer() -> QuantLinear:
    layer = QuantLinear(64, 32, QuantScheme(4, 32), bias=False, dtype=torch.bfloat16)
    for parameter in layer.parameters():
        parameter.data.zero_()
    layer.choose_kernel()
    layer.finished()
    return layer


def test_layers_run_without_all_of_them() -> None:
    code = f"""
import torch, torch._functorch.pyfunctorch
for path in {(*SEEN_IN_TORCH[:4], *SEEN_IN_TORCH[5:8])!r}:
    owner, _, name = path.rpartition(".")
    part = torch
    for step in owner.split("."): part = getattr(part, step)
    delattr(part, name)
torch.jit.is_tracing = torch._jit_internal.is_tracing = lambda: False
from hf_quant.nn import QuantLinear
from hf_quant.core.scheme import QuantScheme
layer = QuantLinear(64, 32, QuantScheme(4, 32), bias=False, dtype=torch.bfloat16)
for parameter in layer.parameters(): parameter.data.zero_()
layer.choose_kernel()
with torch.no_grad(): print(layer(torch.ones(2, 64, dtype=torch.bfloat16)).shape)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([2, 32])", done.stderr
