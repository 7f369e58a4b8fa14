"""Puts quantized modules in place before transformers loads the weights, and finishes them afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from hf_quant.checkpoint.config import check_config
from hf_quant.checkpoint.contents import Contents
from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.data.calibration import Calibration
from hf_quant.disk.memory import give_back_memory
from hf_quant.errors import CheckpointError, HfQuantError, PlanError, printable
from hf_quant.formats import Format, format_named
from hf_quant.formats.native import in_features, wrong_values
from hf_quant.hf._compat import keep_for_saving, updated_conversions
from hf_quant.hf.calibrate_loaded import calibrate, data_for
from hf_quant.hf.candidates import Candidate, candidates
from hf_quant.hf.community import Placed
from hf_quant.hf.foreign_tensors import conversions
from hf_quant.hf.integrity import check_weights
from hf_quant.hf.offload import is_away
from hf_quant.hf.ops import KeepApart, QuantizeOnLoad
from hf_quant.hf.plan import Plan, freeze, make_plan
from hf_quant.hf.preflight import COMPANIONS, check_buffers, check_complete, check_rest, examine
from hf_quant.hf.publishing import guard, release
from hf_quant.hf.saved_names import settle, state_on_disk, stems
from hf_quant.hf.sizes import report_own_sizes, report_true_sizes
from hf_quant.hf.trainable import make_trainable, save_trainable
from hf_quant.nn import QuantEmbedding, QuantExperts, QuantLinear, as_quant_experts
from hf_quant.nn._outside import Outside
from hf_quant.nn._weight import frozen
from hf_quant.nn.experts import stacks

if TYPE_CHECKING:
    from hf_quant.hf.config import HfQuantConfig

CHUNK = 1 << 24  # values looked at together
_NATIVE = format_named("native")
logger = logging.get_logger(__name__)


@register_quantizer("hf_quant")
class HfQuantQuantizer(HfQuantizer):
    """Quantizes while loading (RTN needs no data), or loads what was quantized before."""

    requires_calibration = False  # True would refuse float checkpoints
    quantization_config: HfQuantConfig
    # from this the base class derives converters and parallel plans for the companions of stacked experts
    serialized_names = {"weight": list(_NATIVE.suffixes)}  # noqa: RUF012

    plan: Plan
    data: Calibration | None = None  # what was calibrated on, and what became of each block
    blocks: list[dict[str, Any]] = []  # noqa: RUF012
    placed: Placed  # where the layers of another program's checkpoint belong
    _reader: Format | None = None  # of that checkpoint
    _dtypes: Mapping[str, torch.dtype] = MappingProxyType({})  # what floats of a quantized checkpoint shall be
    failure: HfQuantError | None = None  # met in a conversion, where transformers would bury it in a log table
    _converters: list[Any] | None = None
    saving: tuple[dict[str, Tensor], set[str]] | None = (
        None  # what a trainable model is saved as, and which of it is codes
    )

    @property
    def calibrates(self) -> bool:
        """Whether the model is quantized after it was loaded, on what goes through it."""
        return not self.pre_quantized and self.plan.decision.calibrated

    @property
    def trains(self) -> bool:
        """Whether the model trains, with float weights that the forward pass rounds."""
        return self.quantization_config.training

    # -- before loading -------------------------------------------------------------------------------------------

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise PlanError(
                "device_map sends layers to disk while they are being quantized, and transformers would read the "
                "unquantized file there; quantize and save first, then load the result with this device_map"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before the model is built: refuses numbers that would make that endless."""
        check_config(config.to_dict())
        return super().update_attn_implementation(config)  # type: ignore[no-untyped-call]

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        self.prepare(model, checkpoint_files)

    def prepare(self, model: Any, checkpoint_files: list[str] | None) -> Contents | None:
        """Check a checkpoint as far as its headers and small tensors tell, and put quantized modules in place.

        Args:
            model: On the meta device.
            checkpoint_files: Where its weights are; None where they come as a state dict.

        Returns:
            The layers of a quantized checkpoint.

        Raises:
            HfQuantError: Names file and tensor or field.
        """
        config, self.placed = self.quantization_config, Placed()
        found = candidates(model)
        checkpoint = Checkpoint.of_files([Path(file) for file in checkpoint_files]) if checkpoint_files else None
        contents: Contents | None = None
        with torch.device("cpu"):  # transformers calls this where everything is made on meta
            if self.pre_quantized and self.trains:
                self.plan = make_plan(model, config, frozen=True)
                make_trainable(model, self.plan)
                return None
            if self.pre_quantized and checkpoint is not None:
                check_buffers(model, checkpoint.tensors)
                ours = config.stored is None or "hf_quant" in config.stored
                check_weights(sorted({info.file for info in checkpoint.tensors.values()}), ours=ours)
                contents = self._examine(model, checkpoint, list(found))
            elif config.stored is not None:
                raise PlanError(
                    "a checkpoint that another program quantized is read from its files, not from a state dict"
                )
            else:
                self.plan = make_plan(model, config, frozen=self.pre_quantized)
                if checkpoint is not None:
                    planned = [n if found[n].kind == "experts" else f"{n}.weight" for n in self.plan.schemes]
                    covered = check_rest(model, checkpoint, checkpoint.tensors, set(planned))
                    check_complete(model, self.placed, covered, planned)
        if self.calibrates or self.trains:  # once the weights are there
            freeze(config, self.plan)
            return None
        self._put_in_place(model, found)
        if checkpoint is not None and contents is not None:
            check_complete(model, self.placed, check_rest(model, checkpoint, contents.rest))
        if not self.pre_quantized or contents is not None:
            freeze(self.quantization_config, self.plan)
        self._dtypes = {
            n: p.dtype for n, p in model.named_parameters() if self.pre_quantized and p.is_floating_point()
        }
        return contents

    def _put_in_place(self, model: Any, found: Mapping[str, Candidate]) -> None:
        """Quantized modules where the plan wants them; their parameters are empty."""
        for name in self.plan.schemes:
            if found[name].kind != "experts":
                self._replace(model, name, self.pre_quantized)
        for name in dict.fromkeys(n.rpartition(".")[0] for n in self.plan.schemes if found[n].kind == "experts"):
            own = {n.removeprefix(f"{name}."): s for n, s in self.plan.schemes.items() if n.startswith(f"{name}.")}
            with torch.device("meta"):
                as_quant_experts(
                    model.get_submodule(name), own, quantized=self.pre_quantized,
                    scale_dtypes={leaf: dtype for leaf in own if (dtype := self._finer(f"{name}.{leaf}", model.dtype))},
                )  # fmt: skip
        if self.plan.tied:
            self._tie_companions(model)

    def _examine(self, model: Any, checkpoint: Checkpoint, names: list[str]) -> Contents:
        """Learn from a quantized checkpoint what its layers are; of another program's, write that into the config too."""
        config = self.quantization_config
        foreign = config.stored is not None
        contents, self.placed = examine(model, checkpoint, config)
        if foreign:
            self._reader = contents.fmt
            config.resolve(self.placed.schemes, [name for name in names if name not in self.placed.schemes])
            for note in (*self.placed.notes, *dict.fromkeys(self.placed.dense.values())):
                logger.warning(printable(f"{contents.format}: {note}"))
        self.plan = make_plan(model, config, stored=self.placed.schemes)
        return contents

    def _finer(self, name: str, dtype: torch.dtype) -> torch.dtype | None:
        """The type of a layer's scales in the checkpoint, if ``dtype`` cannot hold all their values."""
        stored = self.placed.scale_dtypes.get(name)
        return stored if stored is not None and torch.promote_types(stored, dtype) != dtype else None

    def _replace(self, model: Any, name: str, quantized: bool) -> None:
        old, scheme = model.get_submodule(name), self.plan.schemes[name]
        new: nn.Module
        with torch.device("meta"):
            if isinstance(old, nn.Embedding):
                new = QuantEmbedding(
                    old.num_embeddings, old.embedding_dim, scheme,
                    padding_idx=old.padding_idx, dtype=old.weight.dtype, quantized=quantized,
                )  # fmt: skip
            else:
                k, n = (old.in_features, old.out_features) if isinstance(old, nn.Linear) else old.weight.shape
                new = QuantLinear(
                    k, n, scheme, bias=old.bias is not None, dtype=old.weight.dtype,
                    scale_dtype=self._finer(name, old.weight.dtype), quantized=quantized, conv1d=not isinstance(old, nn.Linear),
                )  # fmt: skip
        new.train(old.training)
        model.set_submodule(name, new)

    def _tie_companions(self, model: Any) -> None:
        ties = model.all_tied_weights_keys
        for target, source in list(ties.items()):
            if not target.endswith(".weight"):
                continue  # a bias
            head = model.get_submodule(target.rpartition(".")[0])
            if isinstance(head, QuantLinear) and target.rpartition(".")[0] in self.plan.schemes:
                head.shares_codes = True
                for part in COMPANIONS:
                    if getattr(head, f"weight{part}", None) is not None:
                        ties[target + part] = source + part

    # -- while loading --------------------------------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        if self.pre_quantized or self.trains:
            return False
        path, _sep, leaf = param_name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, QuantExperts):
            return leaf in module.schemes
        return isinstance(module, (QuantLinear, QuantEmbedding)) and leaf == "weight"

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        if self.param_needs_quantization(model, param_name):
            scheme = self.plan.schemes.get(param_name) or self.plan.schemes[param_name.removesuffix(".weight")]
            return scheme.bits / 8
        size: int = param.element_size()
        return size

    def get_quantize_ops(self) -> QuantizeOnLoad:
        return QuantizeOnLoad(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        self._converters = updated_conversions(super().update_weight_conversions, weight_conversions, model)
        if self._reader is not None:
            return conversions(self, self._reader, weight_conversions)
        if self.pre_quantized or self.calibrates or self.trains:
            return self._converters
        return [KeepApart.instead_of(c, self) for c in self._converters]

    # -- after loading --------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        if self.calibrates:
            self._calibrate(model)
        if self.trains and not self.pre_quantized:
            make_trainable(model, self.plan)
        if self.calibrates or self.trains:
            fresh = get_model_conversion_mapping(model)  # while it loaded, stacks had no scales that belong to them
            self._converters = updated_conversions(super().update_weight_conversions, fresh, model)
        keep_for_saving(model, self._converters)
        if self.trains:
            return self._finish_trainable(model)
        self._cast(model)
        dispatched = len(set((getattr(model, "hf_device_map", None) or {"": 0}).values())) > 1
        for name, module in model.named_modules():
            if isinstance(module, (QuantLinear, QuantEmbedding, QuantExperts)):
                self._finish(name, module, dispatched)
        self._check_values(model, dispatched)
        report_true_sizes(model)
        guard(model)  # transformers' own ways would publish it unmeasured
        give_back_memory()
        logger.info(self.plan.summary())
        return model

    def _finish_trainable(self, model: Any) -> Any:
        self._check_values(model, dispatched=False)
        guard(model)
        model.save_pretrained = partial(save_trainable, model)
        logger.info(self.plan.summary())
        return model

    def _calibrate(self, model: Any) -> None:
        if len(set((getattr(model, "hf_device_map", None) or {"": 0}).values())) > 1:
            raise PlanError(
                f"{self.quantization_config.method} calibrates on one device; hf-quant quantize needs less of it"
            )
        self.data = data_for(self.quantization_config, model)

        def place(layer: str, tensors: dict[str, nn.Parameter]) -> None:
            path, _, leaf = layer.rpartition(".")
            parent = model.get_submodule(path)
            if leaf in stacks(parent) or isinstance(parent, QuantExperts):
                if not isinstance(parent, QuantExperts):
                    own = {
                        n.removeprefix(f"{path}."): s for n, s in self.plan.schemes.items() if n.startswith(f"{path}.")
                    }
                    with torch.device("meta"):
                        as_quant_experts(parent, own, quantized=True)
                module, stem = parent, leaf
            else:
                bias = parent.get_submodule(leaf).bias
                self._replace(model, layer, quantized=True)
                module, stem = model.get_submodule(layer), "weight"
                module.bias = bias
            for local, tensor in tensors.items():
                tensor._is_hf_initialized = True  # type: ignore[attr-defined]
                module.register_parameter(stem + local.removeprefix("weight"), tensor)

        self.blocks = calibrate(model, self.plan, self.quantization_config, self.data, place)

    def _cast(self, model: Any) -> None:
        """Before 5.21 transformers leaves floats of a quantized checkpoint in their own dtype where it renames them."""
        for name, parameter in model.named_parameters():
            expected = self._dtypes.get(name, parameter.dtype)
            if parameter.device.type != "meta" and parameter.dtype != expected:
                parameter.data = parameter.data.to(expected)

    def _finish(self, name: str, module: nn.Module, dispatched: bool) -> None:
        for local, parameter in sorted(module.named_parameters(recurse=False)):  # a weight before its scale
            if (
                parameter.device.type != "meta"
                and not dispatched
                and getattr(parameter, "_is_hf_initialized", None) is not True
            ):
                raise CheckpointError(f"tensor {name}.{local} is missing from the checkpoint")
            parameter.requires_grad_(False)  # the loader switches it on for every float tensor
        self._check_codes(name, module)
        if isinstance(module, (QuantLinear, QuantExperts)):
            module.keeps_layout = dispatched and hasattr(module, "_hf_hook")
            module.choose_kernel()
            give_back_memory()
        if isinstance(module, Outside):
            module.finished()

    def _check_codes(self, name: str, module: Any) -> None:
        """What a kernel will meet, by whatever way it came here; of what lies on disk, that its file was examined."""
        stems = module.schemes if isinstance(module, QuantExperts) else {"weight": module.scheme}
        for stem, scheme in stems.items():
            full = name if stem == "weight" else f"{name}.{stem}"
            own = {local: getattr(module, stem + local.removeprefix("weight"), None) for local in _NATIVE.suffixes}
            held = {local: tensor for local, tensor in own.items() if tensor is not None}
            wrong: str | None = None
            if not any(tensor.device.type == "meta" for tensor in held.values()):
                wrong = wrong_values(held, scheme, in_features(held["weight"], scheme))
            elif self.pre_quantized and full not in self.placed.schemes:
                wrong = "lies on disk and was not checked"
            if wrong is not None:
                raise CheckpointError(f"{self.placed.files.get(full, full)}: {wrong}")

    def _check_values(self, model: Any, dispatched: bool) -> None:
        """Every floating-point parameter is finite, and (in a quantized checkpoint) came from the checkpoint."""
        optional = getattr(model, "_keys_to_ignore_on_load_missing", None)
        for name, parameter in model.named_parameters():
            if parameter.device.type == "meta":
                continue
            in_kernel = 0 in parameter.shape
            expected = self.pre_quantized and not dispatched and not optional and not in_kernel
            if expected and getattr(parameter, "_is_hf_initialized", None) is not True:
                raise CheckpointError(f"tensor {name} is missing from the checkpoint")
            if not parameter.is_floating_point():
                continue
            parts = parameter.detach().flatten().split(CHUNK)  # a sum in float32 makes a copy in float32
            if not math.isfinite(sum(p.sum(dtype=torch.float32) for p in parts)):
                bad = int((~parameter.isfinite()).sum())
                if bad:
                    raise CheckpointError(f"tensor {name}: {bad} values are NaN or infinite")

    # -- saving and leaving ---------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        if self.quantization_config.saves_training and self.saving is not None:
            return self.saving[0], {}
        state, coded = self.saving or state_on_disk(model, self.quantization_config.format)
        fresh = get_model_conversion_mapping(model)  # as it will be on loading; it may have been another for the base
        if self.quantization_config.format != "compressed_tensors":
            fresh = updated_conversions(super().update_weight_conversions, fresh, model)
        files = settle(model, state, coded, fresh)
        self.quantization_config.files = stems(files)
        return state, {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return self.trains

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # what a config says after saving
        if any(isinstance(module, Outside) and is_away(module) for module in model.modules()):
            raise PlanError(
                "some layers are offloaded, and an offloaded model cannot be dequantized: load it with device_map='cpu' or "
                "without one"
            )
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantExperts):
                module._unpack()
                for stack in list(module.schemes):
                    dense = module.expert_weight(stack, dtype)
                    for part in ("", *COMPANIONS):
                        module._parameters.pop(stack + part, None)
                    module._parameters[stack] = frozen(dense)
                module.__class__ = module.float_class  # type: ignore[assignment]
            elif isinstance(module, (QuantLinear, QuantEmbedding)):
                model.set_submodule(name, _as_float(module, dtype))
        if self.plan.tied:
            model.tie_weights()
        report_own_sizes(model)
        release(model)
        return model


def _as_float(module: QuantLinear | QuantEmbedding, dtype: torch.dtype | None) -> nn.Module:
    """The module of torch or transformers that a quantized one stands in for."""
    weight = module.dequantize(dtype)
    n, k = weight.shape
    if isinstance(module, QuantEmbedding):
        return nn.Embedding(n, k, module.padding_idx, _weight=weight, _freeze=True)
    made: nn.Module
    with torch.device("meta"):
        conv1d: Any = Conv1D  # transformers leaves its __init__ untyped
        made = conv1d(n, k) if module.conv1d else nn.Linear(k, n, bias=module.bias is not None)
    made.weight = frozen(weight.T.contiguous() if module.conv1d else weight)
    if module.bias is not None:
        made.bias = frozen(module.bias.to(weight.dtype))
    return made
