"""The trainable form of a model: what ``HfQuantConfig(..., training=True)`` makes of it, and how it is saved.

``save_pretrained`` writes the quantized model. Only into a folder called ``checkpoint-N``, as ``Trainer`` names what it resumes
from, it writes the float weights and the trained scales and offsets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.core.geometry import Patches, geometry_of
from hf_quant.core.layout import part_name
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.disk.atomic import write_json
from hf_quant.errors import PlanError
from hf_quant.formats import format_named, in_memory_format
from hf_quant.hf import publishing
from hf_quant.hf.likeness import size_of
from hf_quant.hf.plan import Plan
from hf_quant.methods import Method, quantize
from hf_quant.nn import QuantEmbedding, QuantMatrix
from hf_quant.training import FakeQuantEmbedding, FakeQuantLinear, FakeQuantMatrix, FakeQuantPatches
from hf_quant.training.experts import as_fake_quant_experts
from hf_quant.training.modules import SUFFIXES, FakeQuant

RESUMABLE = re.compile(r"checkpoint-\d+")  # transformers' PREFIX_CHECKPOINT_DIR


@torch.no_grad()
def make_trainable(model: Any, plan: Plan) -> None:
    """Let every layer of ``plan`` train, in place.

    Args:
        model: In floating point: its weights stay what they are. Layers that are quantized already, as calibrated methods
            leave them, begin from their codes. On the meta device, where the checkpoint of a training is about to be loaded.
        plan: What becomes of it.

    Raises:
        PlanError: The model is spread over several devices.
    """
    if len(set((getattr(model, "hf_device_map", None) or {"": 0}).values())) > 1:
        raise PlanError("training: a model spread over devices by device_map cannot be trained; DDP and FSDP can")
    trainable_modules: dict[int, nn.Module] = {}  # by the weight, so that modules that share it stay tied
    stacks: dict[str, dict[str, QuantizedTensor]] = {}
    for name, scheme in plan.schemes.items():
        path, _, leaf = name.rpartition(".")
        parent, solver = model.get_submodule(path), plan.decision.solver(scheme)
        if leaf in parent._parameters:
            stacks.setdefault(path, {})[leaf] = _start_of_stack(parent, leaf, scheme, solver)
            continue
        old = model.get_submodule(name)
        new = _trainable(old, scheme, solver)
        first = trainable_modules.setdefault(id(old._parameters["weight"]), new)
        for suffix in SUFFIXES:
            new.register_parameter(f"weight{suffix}", first._parameters[f"weight{suffix}"])
        model.set_submodule(name, new.train(old.training))
    for path, starts in stacks.items():
        as_fake_quant_experts(model.get_submodule(path), starts)
    if plan.tied:
        _tie(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_inference():  # calibration computes in that mode, and autograd takes no such tensors
            tensor.data = tensor.data.clone()


@torch.no_grad()
def begin_from(model: Any, quantized: Any) -> None:
    """Let a trainable model begin as a quantized one, in place: with its codes, and with everything that is not rounded.

    Args:
        model: Trainable.
        quantized: Of the same architecture.

    Raises:
        PlanError: Names a layer that is quantized in another way there, or a tensor that has another shape, is missing, or that
            the model has no place for.
    """
    trained = {name: module for name, module in model.named_modules() if isinstance(module, FakeQuant)}
    coded = {n: module for n, module in quantized.named_modules() if isinstance(module, QuantMatrix | QuantEmbedding)}
    refuse_stacks(model, (f"{name}.{weight}" for name, module in trained.items() for weight in module.trained()))
    refuse_other_schemes(
        {name: module.trained()["weight"] for name, module in trained.items()},
        {name: module.scheme for name, module in coded.items()},
    )
    for name, module in trained.items():
        weight, start = _codes_of(coded[name])
        parameter = module.parameters_of("weight")[""]
        if weight.shape != parameter.shape:
            raise PlanError(f"{name}: {_has(weight)}, and the model has {size_of(parameter.shape)}")
        module.begin("weight", weight, start)
    begun = {f"{name}.weight{suffix}" for name in trained for suffix in SUFFIXES}
    codes = {f"{name}.{part}" for name, module in coded.items() for part in module._parameters if part != "bias"}
    _copy_rest(
        {name: parameter for name, parameter in model.named_parameters() if name not in begun},
        {name: parameter for name, parameter in quantized.named_parameters() if name not in codes},
    )


def _copy_rest(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy what is not rounded."""
    for name, parameter in parameters.items():
        value = values.get(name)
        if value is None or value.shape != parameter.shape or not value.is_floating_point():
            raise PlanError(
                f"{name}: the checkpoint that training begins from has no {size_of(parameter.shape)} floating-point numbers there"
            )
        parameter.copy_(value)
    if (unused := next((name for name in values if name not in parameters), None)) is not None:
        raise PlanError(f"{unused}: {_has(values[unused])}, and the model has no such tensor")


def _has(tensor: Tensor) -> str:
    return f"the checkpoint that training begins from has {size_of(tensor.shape)} numbers there"


def refuse_other_schemes(wanted: Mapping[str, QuantScheme], stored: Mapping[str, QuantScheme]) -> None:
    """Refuse a checkpoint whose layers are not quantized as those that are to be trained.

    Args:
        wanted: Scheme of each layer that is trained, by name.
        stored: Scheme of each layer of the checkpoint that training begins from.

    Raises:
        PlanError: Names the first layer that differs, and both schemes.
    """
    for name, scheme in wanted.items():
        if name not in stored:
            raise PlanError(
                f"{name}: the checkpoint that training begins from does not quantize it, and the scheme asks for {scheme}"
            )
        if stored[name] != scheme:
            raise PlanError(
                f"{name}: the checkpoint that training begins from has {stored[name]}, and the scheme asks for {scheme}: "
                "they must be the same"
            )
    if (other := next((name for name in stored if name not in wanted), None)) is not None:
        raise PlanError(
            f"{other}: the checkpoint that training begins from has {stored[other]}, and the model that is trained keeps this layer "
            "in floating point: they must be the same"
        )


def refuse_stacks(model: Any, names: Iterable[str]) -> None:
    """Refuse stacks of experts among the weights of ``model`` that training is to begin from other codes than those of rounding.

    Raises:
        PlanError: Names the first one.
    """
    for name in names:
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" and leaf in model.get_submodule(path)._parameters:
            raise PlanError(
                f"training: {name}: stacked experts begin from plain rounding: method='rtn' (--method rtn, without --start)"
            )


def _codes_of(old: QuantMatrix | QuantEmbedding) -> tuple[Tensor, QuantizedTensor]:
    """A float weight in the middle of the range of each code, shaped as the model's own class has it; and the codes."""
    start = old.quantized_weight()
    return geometry_of(old).weight(start.dequantize(torch.float32)).contiguous(), start


def _trainable(old: Any, scheme: QuantScheme, solver: Method) -> FakeQuantMatrix | FakeQuantEmbedding:
    geometry = geometry_of(old)
    if isinstance(old, QuantMatrix | QuantEmbedding):  # by a calibrated method, whose codes are the beginning
        (weight, start), dtype = _codes_of(old), old.compute_dtype
    else:
        weight, dtype = old.weight, old.weight.dtype
        start = _start(geometry.matrix(weight), scheme, solver)
    if isinstance(old, nn.Embedding):
        return FakeQuantEmbedding(weight, start, padding_idx=old.padding_idx, dtype=dtype)
    kind = FakeQuantPatches if isinstance(geometry, Patches) else FakeQuantLinear
    return kind(weight, start, bias=old.bias, dtype=dtype, geometry=geometry)


def _start_of_stack(module: Any, name: str, scheme: QuantScheme, solver: Method) -> QuantizedTensor:
    stack = module._parameters[name]
    return QuantizedTensor.stack(
        [_start(part, scheme, solver) for part in geometry_of(module).matrix(stack).unbind(0)]
    )


def _start(weight: Tensor, scheme: QuantScheme, solver: Method) -> QuantizedTensor:
    """The weight ``[N, K]`` quantized; without values if it has none."""
    if weight.device.type != "meta":
        return quantize(solver, weight, scheme, weight.dtype)
    scale = weight.new_empty(weight.shape[0], scheme.groups(weight.shape[1]))
    return QuantizedTensor(weight, scale, None if scheme.symmetric else scale, scheme)


def _tie(model: Any) -> None:
    """Tell transformers that scales and offsets are shared where weights are."""
    ties = model.all_tied_weights_keys
    for target, source in list(ties.items()):
        head = model.get_submodule(target.rpartition(".")[0])
        if isinstance(head, FakeQuant) and target.endswith(".weight"):
            for suffix in SUFFIXES[1:]:
                if head._parameters.get(f"weight{suffix}") is not None:
                    ties[target + suffix] = source + suffix


def save_trainable(model: Any, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
    """Transformers' own, of the quantized model; of the trainable one into a folder called ``checkpoint-N``.

    Args:
        model: Trainable.
        save_directory: Where to.
        args: As for transformers' own.
        state_dict: Of the trainable model, where its parameters are spread over processes.
        kwargs: As for transformers' own.
    """
    quantizer = model.hf_quantizer
    resumable = RESUMABLE.fullmatch(Path(save_directory).name) is not None
    state = model.state_dict() if state_dict is None else state_dict
    quantizer.saving = (dict(state), set()) if resumable else quantized_state(model, state, quantizer.plan.format)
    quantizer.quantization_config.saves_training = resumable
    if resumable:  # Trainer loads it into the model as it is
        kwargs["save_original_format"] = False
    try:
        publishing.save_pretrained(model, save_directory, *args, **kwargs)
    finally:
        quantizer.saving, quantizer.quantization_config.saves_training = None, False
        model.config.dtype = computes_in(model)  # transformers has set it to that of the first parameter
    if (written := Path(save_directory) / "config.json").is_file() and kwargs.get("is_main_process", True):
        _name_dtype(written, model)


def computes_in(model: Any) -> torch.dtype:
    """The dtype that a trainable model computes in; its own ``dtype`` may be that of a parameter that trains in float32."""
    return next(module.compute_dtype for module in model.modules() if isinstance(module, FakeQuant))


def _name_dtype(config: Path, model: Any) -> None:
    """Transformers takes the dtype of the first parameter for the model's; those that train are in float32."""
    written = json.loads(config.read_text(encoding="utf-8"))
    write_json(config, written | {"dtype": str(computes_in(model)).removeprefix("torch.")})


def quantized_state(model: Any, state: Mapping[str, Tensor], format: str) -> tuple[dict[str, Tensor], set[str]]:
    """What is written of a trainable model, by the names of its modules; and which of it is codes and their companions.

    Args:
        model: Trainable.
        state: Its ``state_dict()``; ``DTensor`` are gathered, so all processes must call this.
        format: In which.
    """
    saved, coded = {name: _whole(tensor) for name, tensor in state.items()}, set()
    for path, module in model.named_modules():
        for name in module.trained() if isinstance(module, FakeQuant) else ():
            full = f"{path}.{name}"
            values = {suffix: saved.pop(full + suffix) for suffix in SUFFIXES if full + suffix in saved}
            if not values or full in model.all_tied_weights_keys:  # another process, or module, has it
                continue
            fmt = format_named(format if isinstance(module, FakeQuantMatrix) else in_memory_format())
            for local, tensor in fmt.write(module.quantized(name, values)).items():
                coded.add(_stored_name(full, local))
                saved[_stored_name(full, local)] = tensor
    return saved, coded


def _stored_name(name: str, local: str) -> str:
    """Of ``weight_scale`` and others that belong to the parameter of that name."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.{local}" if leaf == "weight" else part_name(name, local)


def _whole(tensor: Any) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)
    gathered: Tensor = tensor if gather is None else gather()
    return gathered.detach()
