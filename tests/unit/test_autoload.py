"""Registration through torch's entry point; each test is a fresh interpreter, since ``import torch`` happens once."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

import hf_quant

PROXIED = """
import transformers.modeling_utils
from transformers.quantizers import auto
print(type(auto.AUTO_QUANTIZATION_CONFIG_MAPPING.get("hf_quant")).__name__,
      type(auto.AUTO_QUANTIZER_MAPPING.get("hf_quant")).__name__,
      auto.AutoHfQuantizer.merge_quantization_configs.__module__)
"""
BROKEN = """
import os
from hf_quant import _autoload
def broken(): raise RuntimeError("on purpose")
_autoload.{step} = broken
import torch
"""
# stands for hf_quant.hf, which has tests of its own
STUB = """
import sys, types, warnings
warnings.simplefilter("ignore")
import torch, transformers.modeling_utils
from transformers.quantizers import auto
from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationConfigMixin
class HfQuantConfig(QuantizationConfigMixin):
    activations = None
    def __init__(self, **fields): self.__dict__ |= fields
class HfQuantQuantizer:
    def __init__(self, config, **kwargs): self.config = config
hf = types.ModuleType("hf_quant.hf")
hf.HfQuantConfig, hf.HfQuantQuantizer = HfQuantConfig, HfQuantQuantizer
hf.taken_over = lambda stored, activations: ("taken over", stored["quant_method"])
hf.refuse_requantizing = lambda stored, asked: None
hf.known_methods = lambda: ["awq", "compressed-tensors", "gptq"]
"""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What to put on PYTHONPATH so that torch finds the entry point: nothing, if the wheel is installed."""
    try:
        if any(e.group == "torch.backends" and e.name == "hf_quant" for e in distribution("hf-quant").entry_points):
            return ""
    except PackageNotFoundError:
        pass
    folder = tmp_path_factory.mktemp("site")
    info = folder / "hf_quant-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-quant\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nhf_quant = hf_quant._autoload:autoload\n")
    return os.pathsep.join([str(folder), str(Path(hf_quant.__file__).parents[1])])


def python(site: str, code: str, **env: str) -> str:
    path = {"PYTHONPATH": site} if site else {}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | path | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_import_torch_loads_nothing_of_ours_but_the_hook(site: str) -> None:
    code = "import torch, sys; print(sorted(m for m in sys.modules if m.startswith(('hf_quant', 'transformers'))))"
    assert python(site, code).strip() == "['hf_quant', 'hf_quant._autoload', 'hf_quant._upwards', 'hf_quant._waiting']"


def test_the_hook_imports_neither_torch_nor_transformers(site: str) -> None:
    code = "import hf_quant._autoload, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert python(site, code).strip() == "False False"


@pytest.mark.parametrize(
    "first",
    [
        "import torch",
        "import transformers.quantizers.auto",
        "import transformers.modeling_utils",
    ],
)
def test_registers_whatever_is_imported_first(site: str, first: str) -> None:
    assert python(site, first + PROXIED, HF_QUANT_DEBUG="1").split() == ["_Proxy", "_Proxy", "hf_quant._autoload"]


def test_switched_off(site: str) -> None:
    got = python(site, "import torch" + PROXIED, HF_QUANT_AUTOLOAD="0").split()
    assert got == ["NoneType", "NoneType", "transformers.quantizers.auto"]


def test_installing_again_changes_nothing(site: str) -> None:
    code = """
import torch, sys, transformers.modeling_utils
from hf_quant import _autoload
from transformers.quantizers import auto
def state():
    return (len(sys.meta_path), auto.AUTO_QUANTIZER_MAPPING["hf_quant"],
            auto.AutoHfQuantizer.__dict__["merge_quantization_configs"])
before = state()
_autoload.autoload(); _autoload.install()
print(state() == before)
"""
    assert python(site, code).strip() == "True"


def test_a_failure_breaks_no_import_and_is_silent(site: str) -> None:
    install, register = (
        BROKEN.format(step=step) + "import transformers.modeling_utils\nprint('fine')"
        for step in ("install", "_register")
    )
    assert python(site, install).strip() == "fine"
    said = python(site, register, HF_QUANT_DEBUG="1", PYTHONWARNINGS="error::UserWarning")
    assert "on purpose" in said and "fine" in said


def test_proxies_become_the_real_classes_at_first_use(site: str) -> None:
    code = """
sys.modules["hf_quant.hf"] = hf
config = auto.AutoQuantizationConfig.from_dict({"quant_method": "hf_quant", "bits": 4})
print(type(config) is HfQuantConfig, type(auto.AutoHfQuantizer.from_config(config)) is HfQuantQuantizer)
"""
    assert python(site, STUB + code).strip() == "True True"


def test_proxies_survive_a_failed_import(site: str) -> None:
    code = """
from hf_quant import _autoload
class Finder:
    def find_spec(name, path, target=None):
        if name == "hf_quant.hf":
            _autoload.drop_proxies()
            raise ImportError("on purpose")
sys.meta_path.insert(0, Finder)
for _ in range(2):
    try: auto.AutoQuantizationConfig.from_dict({"quant_method": "hf_quant"})
    except ImportError as error: print(error, "hf_quant" in auto.AUTO_QUANTIZER_MAPPING)
"""
    assert python(site, STUB + code).splitlines() == ["on purpose True"] * 2


def test_only_what_we_wrote_or_were_asked_for_is_taken_over(site: str) -> None:
    code = """
sys.modules["hf_quant.hf"] = hf
from hf_quant import _autoload
class Theirs(QuantizationConfigMixin): pass
Theirs.__name__ = "HfQuantConfig"
merge = auto.AutoHfQuantizer.merge_quantization_configs
plain, gptq = {"quant_method": "compressed-tensors"}, {"quant_method": "gptq", "bits": 4}
ours = plain | {"hf_quant": {}}
asked = HfQuantConfig(quant_method="hf_quant")
def outcome(*args):
    try: return merge(*args)
    except Exception as error: return type(error).__name__
done = ("taken over", "compressed-tensors")
print(outcome(ours, None) == done, outcome(ours, asked) == done, outcome(plain, asked) == done)
print(outcome(gptq, asked) == ("taken over", "gptq"))
print(type(outcome(plain, None)).__name__)  # never silently
print(outcome(gptq, None) != ("taken over", "gptq"))
print(merge(quantization_config=ours, quantization_config_from_args=None) == done)
print(outcome({"quant_method": "awq"}, None) == ("taken over", "awq"))  # as the environment says
_autoload.taken_over.add("gptq")
print(outcome(gptq, None) == ("taken over", "gptq"), outcome(plain, None) != done)
print(outcome(gptq, Theirs("hf_quant")) != ("taken over", "gptq"))  # somebody else's config is theirs to answer
print(outcome(gptq, auto.AutoQuantizationConfig.from_dict(gptq)) == ("taken over", "gptq"))  # says nothing else
print(outcome(gptq, auto.AutoQuantizationConfig.from_dict(gptq | {"bits": 8})) != ("taken over", "gptq"))
_autoload.taken_over.add("gtpq")
try: merge(gptq, None)
except ValueError as error: print(error)
"""
    *lines, refusal = python(site, STUB + code, HF_QUANT_TAKE_OVER="awq").splitlines()
    assert lines == [
        "True True True", "True", "CompressedTensorsConfig", "True", "True", "True", "True True", *["True"] * 3
    ]  # fmt: skip
    assert refusal.startswith("HF_QUANT_TAKE_OVER: 'gtpq' is not one of")
