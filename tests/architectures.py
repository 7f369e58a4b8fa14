"""What must hold for a model of any architecture: quantized while it loads, run, saved, read back, and calibrated.

Each check returns its faults, step by step, and numbers; an empty dictionary of faults means that all of it works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_quant import HfQuantConfig
from hf_quant.data.calibration import Calibration
from hf_quant.errors import PlanError
from hf_quant.hf.calibrate_shards import Settings, quantize_streaming
from hf_quant.nn import QuantEmbedding, QuantExperts, QuantMatrix
from tests.tiny_models import inputs_of, relative, run, vocabulary_of

SCHEMES = ("W4A16-g32", "W8A8", "W2A16-g32")
TWIN = {"W8A8": 0.25}  # its activations are rounded, those of its twin are not; CvT's differ by 0.13 to 0.19
LAST_DIGITS = 1e-5  # products in floating point depend on where in memory their factors begin
NEAR = 0.03  # bf16 activations, where an operation for few bits runs
NOTHING = "nothing to quantize"
SEQUENCES, CONTEXT = 8, 24
BATCHES = 3
TEXT = {"input_ids", "decoder_input_ids", "use_cache"}
RANDOM = {"hidden_states", "pixel_values_videos", "pixel_values", "input_features", "input_values"}


@dataclass
class Findings:
    """Steps that failed with their error, and what was measured."""

    faults: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)

    def attempt(self, step: str, action: Callable[[], Any]) -> Any:
        """What ``action`` returns; None, and a fault, if it raises."""
        try:
            return action()
        except Exception as error:
            trace, frames = error.__traceback__, []
            while trace is not None:
                frames.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
                trace = trace.tb_next
            self.faults[step] = f"{type(error).__name__}: {error}"[:300] + f" ({' < '.join(reversed(frames[-4:]))})"
            return None

    def expect(self, step: str, holds: bool, sentence: str) -> None:
        """A fault unless ``holds``."""
        if not holds:
            self.faults[step] = sentence


def saved(model: Any, folder: Path) -> tuple[Any, dict[str, Any]] | None:
    """Save the float model as ``folder/float``; its class and inputs, or None if transformers itself cannot read it back."""
    inputs, kind = inputs_of(model), type(model)
    expected = run(model, inputs)
    model.save_pretrained(folder / "float")
    again = kind.from_pretrained(folder / "float").eval()
    return (kind, inputs) if relative(run(again, inputs), expected) < LAST_DIGITS else None


def check_rounding(kind: Any, inputs: Mapping[str, Any], folder: Path, schemes: tuple[str, ...] = SCHEMES) -> Findings:
    """Round the model in ``folder/float`` while it loads, and do with it whatever a user would."""
    found = Findings()
    base = kind.from_pretrained(folder / "float").eval()
    expected, said = run(base, inputs), _generated(base, inputs)
    for scheme in schemes:
        _check_scheme(found, scheme, kind, inputs, folder, expected, generates=said is not None)
    return found


def _check_scheme(
    found: Findings, scheme: str, kind: Any, inputs: Mapping[str, Any], folder: Path, expected: Tensor, generates: bool
) -> None:
    def load() -> Any:
        return kind.from_pretrained(folder / "float", quantization_config=HfQuantConfig(scheme)).eval()

    model = found.attempt(f"{scheme} load", load)
    if model is None:
        if NOTHING in found.faults[f"{scheme} load"]:
            found.numbers["nothing"] = found.faults.pop(f"{scheme} load")
        return
    plan = model.hf_quantizer.plan
    found.numbers |= {"layers": len(plan.schemes), "share": round(plan.share, 3)}
    got = found.attempt(f"{scheme} forward", lambda: run(model, inputs))
    if got is None:
        return
    found.numbers[f"{scheme} error"] = relative(got, expected)
    if generates:
        found.attempt(f"{scheme} generate", lambda: _generate(model, inputs))
    _check_saved(found, scheme, kind, model, got, inputs, folder / scheme)
    _check_twin(found, scheme, model, got, inputs)


def _check_saved(
    found: Findings, step: str, kind: Any, model: Any, got: Tensor, inputs: Mapping[str, Any], folder: Path
) -> None:
    found.attempt(f"{step} save", lambda: model.save_pretrained(folder))
    if f"{step} save" in found.faults:
        return
    again = found.attempt(f"{step} reload", lambda: kind.from_pretrained(folder).eval())
    if again is not None:
        differ = differing(model, again)
        found.expect(f"{step} bits", not differ, f"{len(differ)} tensors are not those that were saved: {differ[:3]}")
        back = found.attempt(f"{step} run again", lambda: run(again, inputs))
        same = back is not None and relative(back, got) < LAST_DIGITS
        found.expect(f"{step} outputs", same, "the reloaded model computes something else")


def differing(model: Any, again: Any) -> list[str]:
    """Names of tensors that only one of two models has, or that differ in a bit."""
    one, other = model.state_dict(), again.state_dict()
    return sorted(
        name for name in one.keys() | other.keys()
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    )  # fmt: skip


def _check_twin(found: Findings, step: str, model: Any, got: Tensor, inputs: Mapping[str, Any]) -> None:
    twin = found.attempt(f"{step} dequantize", lambda: model.dequantize())
    if twin is None:
        return
    left = {type(m).__name__ for m in twin.modules() if isinstance(m, QuantMatrix | QuantEmbedding | QuantExperts)}
    found.expect(f"{step} dequantize", not left, f"still quantized: {sorted(left)}")
    dense = found.attempt(f"{step} twin", lambda: run(twin, inputs))
    if dense is not None:
        found.numbers[f"{step} twin"] = distance = relative(got, dense)
        found.expect(f"{step} twin", distance < TWIN.get(step, NEAR), f"{distance:.3g} away from its dequantized twin")


def _generated(model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """Two tokens that the float model generates; None if it does not."""
    try:
        return _generate(model, inputs)
    except Exception:  # of any type: transformers' own
        return None


def _generate(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    if not model.can_generate():
        raise PlanError("it generates nothing")
    given = {n: v for n, v in inputs.items() if n not in ("use_cache", "decoder_input_ids")}
    return model.generate(**given, max_new_tokens=2, min_new_tokens=2, do_sample=False)


def calibration_inputs(config: Any, inputs: Mapping[str, Any]) -> Tensor | list[dict[str, Tensor]]:
    """Token ids for a model that reads text alone, else batches of all that it reads."""
    random = torch.Generator().manual_seed(7)
    limit = min(vocabulary_of(config), 140)
    if "input_ids" in inputs and inputs.keys() <= TEXT:
        return torch.randint(min(20, limit - 1), limit, (SEQUENCES, CONTEXT), generator=random)
    return [_like(inputs, random) for _ in range(BATCHES)]


def _like(inputs: Mapping[str, Any], random: torch.Generator) -> dict[str, Tensor]:
    """Other random pixels or sounds of the same shapes, and the same tokens."""
    return {
        name: torch.randn(tensor.shape, generator=random) if name in RANDOM else tensor
        for name, tensor in inputs.items()
        if isinstance(tensor, Tensor)
    }


def check_calibration(
    kind: Any, inputs: Mapping[str, Any], folder: Path, scheme: str = "W4A16-g32", method: str = "calibrated"
) -> Findings:
    """Calibrate the model in ``folder/float`` in memory and from its shards, and compare the two bit for bit."""
    found = Findings()
    base = kind.from_pretrained(folder / "float").eval()
    expected = run(base, inputs)
    data = calibration_inputs(base.config, inputs)
    model = found.attempt(
        "memory",
        lambda: kind.from_pretrained(
            folder / "float", quantization_config=HfQuantConfig(scheme, method=method, calibration=data)
        ).eval(),
    )
    if model is None:
        return found
    got = found.attempt("memory forward", lambda: run(model, inputs))
    if got is None:
        return found
    found.numbers["error"] = relative(got, expected)
    rounded = kind.from_pretrained(folder / "float", quantization_config=HfQuantConfig(scheme)).eval()
    found.numbers["error of rounding"] = relative(run(rounded, inputs), expected)
    _check_saved(found, "memory", kind, model, got, inputs, folder / "memory")
    streamed = found.attempt("stream", lambda: _stream(kind, folder, HfQuantConfig(scheme, method=method), data))
    if streamed is not None:
        differ = differing(model, streamed)
        found.expect("stream bits", not differ, f"{len(differ)} tensors differ from those in memory: {differ[:3]}")
    return found


def _stream(kind: Any, folder: Path, config: HfQuantConfig, data: Tensor | list[dict[str, Tensor]]) -> Any:
    stage = folder / "stream"
    stage.mkdir()
    given = Calibration(data, "ids", []) if isinstance(data, Tensor) else Calibration.of_batches(data)
    quantize_streaming(folder / "float", config, given, folder / "work", stage, Settings(lambda _line: None))
    return kind.from_pretrained(stage).eval()
