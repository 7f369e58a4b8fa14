"""The quantizer that transformers calls: it inserts quantized modules before the weights are loaded, and finishes them afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from hf_quant.checkpoint.config import check_config
from hf_quant.checkpoint.contents import Contents
from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.core.layout import PARTS, WEIGHT
from hf_quant.data.calibration import Calibration
from hf_quant.disk.memory import give_back_memory
from hf_quant.errors import HfQuantError, PlanError, printable
from hf_quant.formats import Format, in_memory_format
from hf_quant.hf import attention
from hf_quant.hf._compat import keep_for_saving, updated_conversions
from hf_quant.hf.calibrate_loaded import calibrate, data_for
from hf_quant.hf.candidates import Candidate, candidates
from hf_quant.hf.community import Placed
from hf_quant.hf.config import AUTO
from hf_quant.hf.foreign_tensors import conversions
from hf_quant.hf.integrity import check_weights
from hf_quant.hf.loaded_values import cast, check_codes, check_complete_module, check_floats, keep_in_float32
from hf_quant.hf.modules import Modules, to_float
from hf_quant.hf.offload import is_away
from hf_quant.hf.ops import KeepApart, QuantizeOnLoad
from hf_quant.hf.plan import Plan, freeze, make_plan
from hf_quant.hf.preflight import absent_poolers, check_buffers, check_complete, check_rest, examine
from hf_quant.hf.publishing import guard, release
from hf_quant.hf.resizing import refuse_resizing
from hf_quant.hf.saved_names import settle, state_on_disk, stems
from hf_quant.hf.sizes import report_own_sizes, report_true_sizes
from hf_quant.hf.trainable import make_trainable, refuse_stacks, save_trainable
from hf_quant.nn import QuantEmbedding, QuantExperts, QuantMatrix
from hf_quant.nn._outside import Outside

if TYPE_CHECKING:
    from hf_quant.hf.config import HfQuantConfig

logger = logging.get_logger(__name__)
FREED = 64 << 20  # bytes of codes that a kernel's layout has taken the place of, until their memory is given back


@register_quantizer("hf_quant")
class HfQuantQuantizer(HfQuantizer):
    """Quantizes a float model while it loads, or loads a quantized checkpoint."""

    requires_calibration = False  # True would refuse float checkpoints
    quantization_config: HfQuantConfig
    # the base class derives converters and parallel plans for the companions of stacked experts from these
    serialized_names = {WEIGHT: list(PARTS)}  # noqa: RUF012

    plan: Plan
    data: Calibration | None = None  # the calibration data, and the record of each block
    blocks: list[dict[str, Any]] = []  # noqa: RUF012
    placed: Placed  # the layers of a quantized checkpoint, by their names in the model
    _reader: Format | None = None  # the format of another program's checkpoint
    _dtypes: Mapping[str, torch.dtype] = MappingProxyType({})  # expected dtypes of floats in a quantized checkpoint
    failure: HfQuantError | None = None  # raised in a conversion, where transformers would only log it
    _converters: list[Any] | None = None
    saving: tuple[dict[str, Tensor], set[str]] | None = (
        None  # what is saved of a trainable model, and which tensors of it are coded
    )

    def __init__(self, quantization_config: HfQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:  # the plan is written into it, and one configuration may serve several models
            self.quantization_config = copy(quantization_config)

    @property
    def calibrates(self) -> bool:
        """Whether the model is calibrated after it was loaded."""
        return not self.pre_quantized and self.plan.decision.calibrated

    @property
    def trains(self) -> bool:
        """Whether the model is trained with fake quantization."""
        return self.quantization_config.training

    @property
    def _modules(self) -> Modules:
        return Modules(self.plan, self.placed.scale_dtypes)

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
        """Check the headers and small tensors of a checkpoint, and insert quantized modules.

        Args:
            model: On the meta device.
            checkpoint_files: Files of its weights; None for a state dict.

        Returns:
            The layers of a quantized checkpoint.

        Raises:
            HfQuantError: Names file and tensor or field.
        """
        config, self.placed = self.quantization_config, Placed()
        by_name = candidates(model)
        checkpoint = Checkpoint.of_files([Path(file) for file in checkpoint_files]) if checkpoint_files else None
        contents: Contents | None = None
        with torch.device("cpu"):  # transformers calls this where the default device is meta
            if self.pre_quantized and self.trains:
                self.plan = make_plan(model, config, frozen=True)
                make_trainable(model, self.plan)
                return None
            if self.pre_quantized and checkpoint is not None:
                check_buffers(model, checkpoint.tensors)
                ours = config.stored is None or "hf_quant" in config.stored
                check_weights(sorted({info.file for info in checkpoint.tensors.values()}), ours=ours)
                contents = self._examine(model, checkpoint, list(by_name))
            elif config.stored is not None:
                raise PlanError(
                    f"a checkpoint in the format {config.stored.get('quant_method')} is read from its files, not from a state dict: "
                    "save_pretrained writes them"
                )
            else:
                self._plan_floats(model, checkpoint, by_name)
        if self.calibrates:
            self._prepare_calibration(model)
        if self.calibrates or self.trains:  # once the weights are there
            freeze(config, self.plan)
            return None
        self._modules.put_in_place(model, by_name, quantized=self.pre_quantized)
        if checkpoint is not None and contents is not None:
            check_complete(model, self.placed, check_rest(model, checkpoint, contents.rest))
        if not self.pre_quantized or contents is not None:
            freeze(self.quantization_config, self.plan)
        if self.pre_quantized:
            keep_in_float32(model)
        self._dtypes = {
            n: p.dtype for n, p in model.named_parameters() if self.pre_quantized and p.is_floating_point()
        }
        return contents

    def _plan_floats(self, model: Any, checkpoint: Checkpoint | None, by_name: Mapping[str, Candidate]) -> None:
        """The plan of a model whose weights are floating point, or codes in a state dict, and a check of its files.

        Raises:
            HfQuantError: As `prepare`.
        """
        config = self.quantization_config
        if checkpoint is not None:
            config.modules_to_not_convert = [*config.modules_to_not_convert, *absent_poolers(model, checkpoint)]
        self.plan = make_plan(model, config, frozen=self.pre_quantized)
        if checkpoint is not None:
            planned = [n if by_name[n].kind == "experts" else f"{n}.weight" for n in self.plan.schemes]
            covered = check_rest(model, checkpoint, checkpoint.tensors, set(planned))
            check_complete(model, self.placed, covered, planned)  # what else is missing, transformers says

    def _prepare_calibration(self, model: Any) -> None:
        """Read the calibration data; what cannot be is refused here, and not after the weights were read or calibrated.

        Raises:
            HfQuantError: As `data_for`, or experts in a stack shall be trained.
        """
        if self.trains:
            refuse_stacks(model, self.plan.schemes)
        with torch.device("cpu"):
            self.data = data_for(self.quantization_config, model)

    def _examine(self, model: Any, checkpoint: Checkpoint, names: list[str]) -> Contents:
        """Find the layers of a quantized checkpoint; those of another program are also written into the config."""
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

    # -- while loading --------------------------------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        if self.pre_quantized or self.trains:
            return False
        path, _sep, leaf = param_name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, QuantExperts):
            return leaf in module.schemes
        return isinstance(module, (QuantMatrix, QuantEmbedding)) and leaf == "weight"

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
        attention.install()
        if self.calibrates:
            self._calibrate(model)
        if self.trains and not self.pre_quantized:
            make_trainable(model, self.plan)
        if self.calibrates or self.trains:
            fresh = get_model_conversion_mapping(model)  # when the model was loaded, its stacks had no scales
            self._converters = updated_conversions(super().update_weight_conversions, fresh, model)
        keep_for_saving(model, self._converters)
        if self.trains:
            return self._finish_trainable(model)
        cast(model, self._dtypes)
        dispatched = len(set((getattr(model, "hf_device_map", None) or {"": 0}).values())) > 1
        freed = 0
        for name, module in model.named_modules():
            if isinstance(module, (QuantMatrix, QuantEmbedding, QuantExperts)):
                freed += sum(parameter.nbytes for parameter in module.parameters(recurse=False))
                self._finish(name, module, dispatched)
            if freed > FREED:
                give_back_memory()
                freed = 0
        check_floats(model, from_checkpoint=self.pre_quantized and not dispatched)
        report_true_sizes(model)
        guard(model)  # transformers' own methods would publish it without a gate
        give_back_memory()
        logger.info(self.plan.summary())
        return model

    def _finish_trainable(self, model: Any) -> Any:
        check_floats(model, from_checkpoint=self.pre_quantized)
        guard(model)
        model.save_pretrained = partial(save_trainable, model)
        refuse_resizing(model)
        logger.info(self.plan.summary())
        return model

    def _calibrate(self, model: Any) -> None:
        if len(set((getattr(model, "hf_device_map", None) or {"": 0}).values())) > 1:
            raise PlanError(
                f"{self.quantization_config.method} calibrates on one device; hf-quant quantize needs less of it"
            )
        assert self.data is not None  # since `prepare`
        place = partial(self._modules.place, model)
        self.blocks = calibrate(model, self.plan, self.quantization_config, self.data, place)

    def _finish(self, name: str, module: nn.Module, dispatched: bool) -> None:
        if not dispatched:
            check_complete_module(name, module)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)  # the loader enables it for every float tensor
        check_codes(name, module, self.placed, pre_quantized=self.pre_quantized)
        if isinstance(module, (QuantMatrix, QuantExperts)):
            module.settle()
        if isinstance(module, Outside):
            module.finished()

    # -- saving and leaving ---------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        if self.quantization_config.saves_training and self.saving is not None:
            return self.saving[0], {}
        state, coded = self.saving or state_on_disk(model, self.quantization_config.format)
        fresh = get_model_conversion_mapping(model)  # as in loading the result, which may differ from loading the base
        if self.quantization_config.format in (AUTO, in_memory_format()):
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
        if self.trains:
            raise PlanError(
                "this model is being trained with rounded weights, and these are not all that it holds: save it, load what was "
                "saved, and dequantize that"
            )
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # what a config says after saving
        if any(isinstance(module, Outside) and is_away(module) for module in model.modules()):
            raise PlanError(
                "some layers are offloaded, and an offloaded model cannot be dequantized: load it with device_map='cpu' or "
                "without one"
            )
        to_float(model, dtype)
        if self.plan.tied:
            model.tie_weights()
        report_own_sizes(model)
        release(model)
        return model
