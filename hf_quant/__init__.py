"""Group-wise INT8/4/3/2 quantization for transformers models: quantize, measure, save, load.

What `__all__` lists is public, and nothing else is. The functions do what the commands of the same name do, with the same
options, and return what ``--json`` prints as a typed result::

    import hf_quant as hq

    done = hq.quantize("examples/ref-llama-16m", "small", scheme="W4A16-g128", max_kl=0.05)
    model = hq.load(str(done.folder))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_quant import _upwards, _waiting

if TYPE_CHECKING:
    from hf_quant.errors import HfQuantError as HfQuantError
    from hf_quant.hf import HfQuantConfig as HfQuantConfig
    from hf_quant.hf import QuantCache as QuantCache
    from hf_quant.hf import load as load
    from hf_quant.hf import merge_adapters as merge_adapters
    from hf_quant.hf import prepare_for_training as prepare_for_training
    from hf_quant.hf import take_over as take_over
    from hf_quant.jobs.convert import ConvertResult as ConvertResult
    from hf_quant.jobs.convert import convert as convert
    from hf_quant.jobs.evaluate import EvaluateResult as EvaluateResult
    from hf_quant.jobs.evaluate import evaluate as evaluate
    from hf_quant.jobs.generate import GenerateResult as GenerateResult
    from hf_quant.jobs.generate import generate as generate
    from hf_quant.jobs.ladder import LadderResult as LadderResult
    from hf_quant.jobs.ladder import ladder as ladder
    from hf_quant.jobs.plan import PlannedModel as PlannedModel
    from hf_quant.jobs.plan import PlanResult as PlanResult
    from hf_quant.jobs.plan import plan as plan
    from hf_quant.jobs.push import PushResult as PushResult
    from hf_quant.jobs.push import push as push
    from hf_quant.jobs.quantize import QuantizedModel as QuantizedModel
    from hf_quant.jobs.quantize import QuantizeResult as QuantizeResult
    from hf_quant.jobs.quantize import quantize as quantize
    from hf_quant.jobs.repair import RepairResult as RepairResult
    from hf_quant.jobs.repair import repair as repair
    from hf_quant.jobs.train import train as train
    from hf_quant.jobs.verify import VerifyResult as VerifyResult
    from hf_quant.jobs.verify import verify as verify
    from hf_quant.nn import QuantLinear as QuantLinear
    from hf_quant.training import Distillation as Distillation

__version__ = "0.1.0"
__all__ = [
    "ConvertResult",
    "Distillation",
    "EvaluateResult",
    "GenerateResult",
    "HfQuantConfig",
    "HfQuantError",
    "LadderResult",
    "PlanResult",
    "PlannedModel",
    "PushResult",
    "QuantCache",
    "QuantLinear",
    "QuantizeResult",
    "QuantizedModel",
    "RepairResult",
    "VerifyResult",
    "convert",
    "evaluate",
    "generate",
    "ladder",
    "load",
    "merge_adapters",
    "plan",
    "prepare_for_training",
    "push",
    "quantize",
    "repair",
    "take_over",
    "train",
    "verify",
]
_HOMES = {
    "errors": ("HfQuantError",),
    "hf": ("HfQuantConfig", "QuantCache", "load", "merge_adapters", "prepare_for_training", "take_over"),
    "jobs.convert": ("ConvertResult", "convert"),
    "jobs.evaluate": ("EvaluateResult", "evaluate"),
    "jobs.generate": ("GenerateResult", "generate"),
    "jobs.ladder": ("LadderResult", "ladder"),
    "jobs.plan": ("PlanResult", "PlannedModel", "plan"),
    "jobs.push": ("PushResult", "push"),
    "jobs.quantize": ("QuantizeResult", "QuantizedModel", "quantize"),
    "jobs.repair": ("RepairResult", "repair"),
    "jobs.train": ("train",),
    "jobs.verify": ("VerifyResult", "verify"),
    "nn": ("QuantLinear",),
    "training": ("Distillation",),
}


_NOT_HERE = {
    "eval": "; the command hf-quant eval is the function evaluate",
    **{
        name: f"; that is a command only: in a notebook, !python -m hf_quant.cli {name} --help"
        for name in ("bench", "card", "doctor", "inspect", "report")
    },
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when something of theirs is asked for."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"hf_quant.{home}"), name)
    raise AttributeError(f"module 'hf_quant' has no attribute {name!r}{_NOT_HERE.get(name, '')}")


def __dir__() -> list[str]:
    """The public names, for completion in a notebook."""
    return [*__all__, "__version__"]


def _push_model(*args: Any, **options: Any) -> str:
    link: str = import_module("hf_quant.publish.push").push_model(*args, **options)
    return link


_upwards.push_model = _push_model
_upwards.transformers_plugin = lambda: import_module("hf_quant.hf")
_upwards.rounding = lambda: import_module("hf_quant.kernels._native.rounding")
_upwards.compiled = lambda: import_module("hf_quant.kernels._native.compiled")
_upwards.words = lambda: import_module("hf_quant.kernels._native.words")
_waiting.spin_briefly()
