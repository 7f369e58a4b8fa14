"""Every method with every scheme, format and way to run: it works, or it is refused before anything is computed.

The methods come from the plug-in folders, so that a new one joins by itself. `benchmarks/options.py` runs every case and
prints those that fail; CI runs a fixed sample.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hf_quant import HfQuantConfig, _plugins, load
from hf_quant.core.scheme import QuantScheme
from hf_quant.data.calibration import Calibration
from hf_quant.errors import HfQuantError
from hf_quant.hf.calibrate_shards import Settings, quantize_streaming
from hf_quant.solve.recipes import PRESETS, preset
from tests import yardsticks

SCHEMES = (
    "W8A16-g32", "W4A16-g32", "W4A16-g128-asym", "W3A16-g-1", "W2A16-g16-asym", "W4A16-g32-o1%", "W3A16-g32-asym-o1%",
    "W4A16-g32-o2%-columns", "W8A8", "W8A8-static", "W8A8-threshold", "W8A8-o2%-columns", "W4A8-g32", "W4A8-g32-asym-static",
)  # fmt: skip
FORMATS = ("auto", "native", "compressed_tensors")
PLACES = ("memory", "shards")
IDS = torch.randint(3, 259, (6, 40), generator=torch.Generator().manual_seed(0))
WORSE = 1.25  # times the error of rounding, which no method may pass by more; calibrated on 240 tokens they scatter


@dataclass(frozen=True)
class Case:
    """One combination of options."""

    method: str
    scheme: str
    fmt: str
    place: str

    def __str__(self) -> str:
        return f"{self.method} {self.scheme} {self.fmt} {self.place}"


def methods() -> list[str]:
    """Every preset, every method, and every transform before rounding."""
    transforms = _plugins.names("transforms")
    return sorted({*PRESETS, *_plugins.names("methods"), *(f"{name}+rtn" for name in transforms)})


def cases() -> list[Case]:
    """All combinations."""
    return [Case(*options) for options in itertools.product(methods(), SCHEMES, FORMATS, PLACES)]


class Options:
    """A model to try them on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = yardsticks.make("outliers", folder / "base")
        self.base = self._logits(load(str(self.model)))
        self.rounded: dict[str, float] = {}

    def fault(self, case: Case) -> str | None:
        """What is wrong with one combination; None where it works or is refused as it should be."""
        with _computed() as computed:
            try:
                model, saved = getattr(self, case.place)(case)
            except HfQuantError as refusal:
                return f"refused after something was computed: {refusal}" if computed else None
            except Exception as error:
                return f"{type(error).__name__}: {error}"
        logits = self._logits(model)
        if not logits.isfinite().all():
            return "logits are not finite"
        if saved is not None and not torch.equal(self._logits(load(str(saved))), logits):
            return "loaded again it computes something else"
        error, limit = self._error(logits), WORSE * self._rounding(case.scheme) + 0.01
        return f"its error of {error:.3g} is more than {limit:.3g}" if error > limit else None

    def memory(self, case: Case) -> tuple[Any, Path | None]:
        """Through ``from_pretrained`` and ``save_pretrained``."""
        model = load(str(self.model), quantization_config=self._config(case)).eval()
        out = self._empty("saved")
        model.save_pretrained(out)
        return model, out

    def shards(self, case: Case) -> tuple[Any, Path | None]:
        """Block by block, as the command does; methods that look at nothing are quantized in memory there too."""
        config = self._config(case)
        if not preset(case.method, QuantScheme.parse(case.scheme)).calibrated:
            return self.memory(case)
        out, data = self._empty("out"), Calibration(IDS, "ids", [])
        quantize_streaming(self.model, config, data, self._empty("work"), out, Settings(lambda _: None))
        return load(str(out)).eval(), None

    def _config(self, case: Case) -> HfQuantConfig:
        calibrated = preset(case.method, QuantScheme.parse(case.scheme)).calibrated
        return HfQuantConfig(case.scheme, method=case.method, format=case.fmt, calibration=IDS if calibrated else None)

    def _empty(self, name: str) -> Path:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir()
        return self.folder / name

    def _rounding(self, scheme: str) -> float:
        """The error of plain rounding."""
        if scheme not in self.rounded:
            looks = QuantScheme.parse(scheme).needs_ranges  # at activations
            config = HfQuantConfig(scheme, calibration=IDS if looks else None, method="gptq" if looks else "rtn")
            self.rounded[scheme] = self._error(self._logits(load(str(self.model), quantization_config=config)))
        return self.rounded[scheme]

    def _error(self, logits: torch.Tensor) -> float:
        return ((logits - self.base).norm() / self.base.norm()).item()

    @staticmethod
    @torch.no_grad()
    def _logits(model: Any) -> torch.Tensor:
        logits: torch.Tensor = model.eval()(input_ids=IDS).logits.float()
        return logits


@contextmanager
def _computed() -> Iterator[list[str]]:
    """Names of the methods that have chosen codes so far."""
    calls: list[str] = []
    with ExitStack() as stack:
        for name in _plugins.names("methods"):
            kind = _plugins.load("methods", name).METHOD
            quantize = kind.quantize

            def counted(self: Any, *args: Any, _quantize: Any = quantize, _name: str = name, **kwargs: Any) -> Any:
                calls.append(_name)
                return _quantize(self, *args, **kwargs)

            stack.enter_context(mock.patch.object(kind, "quantize", counted))
        yield calls
