"""What a caller may ask for. Everything here is checked without torch, so that wrong options are refused at once."""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_quant.errors import HfQuantError, OptionError, suggestion

if TYPE_CHECKING:
    import torch

    from hf_quant.evaluation.gate import Budget
    from hf_quant.hf import HfQuantConfig

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
DTYPES = {
    "auto": "auto", "float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16", "half": "float16",
}  # fmt: skip
DEVICES = (
    "cpu",
    "cuda",
    "mps",
    "xpu",
    "auto",
    "balanced",
    "balanced_low_0",
    "sequential",
)  # the last four divide a model
GPU_NODES = (
    "nvidiactl",
    "nvidia0",
    "kfd",
    "dxg",
    "nvhost-gpu",
    "nvmap",
)  # in /dev, of drivers; the last two are Jetson's
LARGEST_SEED = 2**62  # torch takes 64 bits, and what draws several times adds to it
TYPO = 0.85  # likeness of two names of which one was meant for the other
MANY, LONGEST = 1000, 255  # names in a folder that are compared, and characters of a name
ADAPTER = "adapter_config.json"  # of PEFT
WANTED = "name the folder of a Hugging Face model (config.json and safetensors), or a Hub id such as owner/name"


def check_model(model: str | os.PathLike[str], revision: str | None = None) -> str:
    """The folder or Hub id of a model, as a string; a ``revision`` is of a Hub id.

    Raises:
        OptionError: A revision of a folder is asked for.
        HfQuantError: It is neither; the message says what it is, and what to do about it.
    """
    name = os.fspath(model)
    path = Path(name)
    if path.is_file():
        raise HfQuantError(f"{name}: {_of_file(path)}")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise HfQuantError(f"{name}: {_of_folder(path)}")
        if (path / ADAPTER).is_file():
            raise HfQuantError(
                f"{name}: transformers would load the adapter beside this model ({ADAPTER}): merge it and save that, or move the files "
                "of the adapter into another folder"
            )
        if revision is not None:
            raise OptionError(
                f"--revision {revision}: {name} is a folder here, and only models on the Hub have revisions"
            )
        return name
    nearest = _nearest(path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".") or (nearest and _is_typo(path, nearest)):
        raise HfQuantError(f"{name}: {no_folder(path, WANTED)}")
    return name


def no_folder(path: Path, wanted: str) -> str:
    """That there is no such folder, and which one is called much like it; or else what is ``wanted``."""
    nearest = _nearest(path)
    return "no such folder; " + (f"did you mean {nearest}?" if nearest else wanted)


def _nearest(path: Path) -> Path | None:
    """What lies where ``path`` would, and is called much like it; None if nothing is."""
    above = next(folder for folder in path.parents if folder.is_dir() or folder == folder.parent)
    if not above.is_dir():
        return None
    wanted = path.relative_to(above).parts[0]
    try:
        names = [entry.name for entry in above.iterdir() if not entry.name.startswith(".")][:MANY]
    except OSError:
        return None
    close = difflib.get_close_matches(wanted[:LONGEST], names, 1)
    if not close:
        return None
    nearest = above / close[0] / Path(*path.relative_to(above).parts[1:])
    return nearest if nearest.exists() else above / close[0]


def _is_typo(path: Path, nearest: Path) -> bool:
    """Whether a name that could be a Hub id rather means a folder: the same version numbers, and hardly another letter."""
    digits = [re.findall(r"\d+", name.name) for name in (path, nearest)]
    longer = path.name.startswith(nearest.name) or nearest.name.startswith(path.name)
    alike = difflib.SequenceMatcher(None, path.name, nearest.name).ratio() > TYPO
    return (
        path.parent == nearest.parent
        and digits[0] == digits[1]
        and alike
        and not longer
        and (nearest / "config.json").is_file()
    )


def _of_file(path: Path) -> str:
    if path.suffix.lower() == ".gguf":
        return f"a GGUF file: hf-quant convert {path} --to native -o FOLDER makes a model of it"
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".json"):
        return f"a single file; name the folder that holds it, {path.parent}"
    return f"a file, not a model; {WANTED}"


def _of_folder(folder: Path) -> str:
    if (folder / ADAPTER).is_file():
        return (
            "an adapter (PEFT), not a whole model; merge it into its base first: AutoPeftModelForCausalLM.from_pretrained(...), "
            "then merge_and_unload(), or hf_quant.merge_adapters(model) where the base is quantized, and save_pretrained(...)"
        )
    if (folder / "model_index.json").is_file():
        parts = sorted(p.parent.name for p in folder.glob("*/config.json"))
        return f"a diffusers pipeline; name one of its transformers models, a folder in it ({', '.join(parts)})"
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"GGUF files: hf-quant convert {ggufs[0]} --to native -o FOLDER makes a model of one"
    return f"no config.json in this folder; {WANTED}"


def size_in_bytes(value: int | str) -> int:
    """Bytes of a size such as ``"4GB"``, ``"512MiB"``, ``"4G"``, or a plain number.

    Raises:
        OptionError: It is no size.
    """
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([KMGT]?I?)B?\s*", str(value).upper())
    if match is None or match[2] not in UNITS:
        raise OptionError(f"{value!r} is not a size; write for example 4GB, 512MiB or 2000000")
    return int(float(match[1]) * UNITS[match[2]])


def dtype_named(dtype: object) -> str:
    """Full name of a type that models compute in, from that, a short one (``"bf16"``) or a ``torch.dtype``.

    Raises:
        OptionError: There is no such type.
    """
    name = DTYPES.get(str(dtype).removeprefix("torch.").lower())
    if name is None:
        raise OptionError(f"{dtype!r} is not one of {', '.join(dict.fromkeys(DTYPES.values()))}")
    return name


def schemes(
    scheme: str | Sequence[str] | None, bits: int | None, group_size: int | None, asym: bool | None
) -> tuple[str, ...]:
    """Slugs of the schemes that were asked for, either by name or by their parts.

    Raises:
        SchemeError: One of them is impossible.
        OptionError: A scheme is named twice, or in both ways; or no method makes it.
    """
    from hf_quant.core.scheme import QuantScheme, fixed_zero

    named = (scheme,) if isinstance(scheme, str) else tuple(scheme or ())
    if not named:
        bits = 4 if bits is None else bits
        return (str(QuantScheme(bits, 128 if group_size is None else group_size, fixed_zero(bits, asym))),)
    options = {
        "--bits": bits is not None,
        "--group-size": group_size is not None,
        "--asym" if asym else "--sym": asym is not None,
    }
    if also := [option for option, is_given in options.items() if is_given]:
        raise OptionError(f"--scheme {named[0]} says all that {also[0]} would: give one of them")
    slugs = tuple(map(_makeable, named))
    if len(set(slugs)) < len(slugs):
        raise OptionError(
            f"--scheme {next(slug for slug in slugs if slugs.count(slug) > 1)} is given twice: leave one out"
        )
    return slugs


def overrides(override: Mapping[str, str | None]) -> dict[str, str | None]:
    """Glob to slug; ``"float"`` and None both leave a layer in floating point.

    Raises:
        SchemeError: One of the schemes is impossible.
        OptionError: No method makes it.
    """
    return {glob: None if slug in (None, "float") else _makeable(str(slug)) for glob, slug in override.items()}


def _makeable(slug: str) -> str:
    """The slug of a scheme as it is written everywhere, if a method makes it."""
    from hf_quant.core.scheme import QuantScheme

    scheme = QuantScheme.parse(slug)
    if scheme.foreign:
        raise OptionError(f"{slug}: {scheme.foreign}")
    return str(scheme)


def configs(
    slugs: Sequence[str], *, method: str, format: str, ignore: Sequence[str], override: Mapping[str, str | None],
    lm_head: bool, embeddings: bool, epochs: int | None = None,
) -> list[HfQuantConfig]:  # fmt: skip
    """One configuration for every scheme that was asked for."""
    from hf_quant.hf import HfQuantConfig

    return [
        HfQuantConfig(
            slug,
            method=method,
            format=format.replace("-", "_"),
            overrides=overrides(override),
            modules_to_not_convert=list(ignore),
            quantize_lm_head=lm_head,
            quantize_embeddings=embeddings,
            epochs=epochs,
        )
        for slug in slugs
    ]


def budget(
    max_kl: float | None, max_ppl_increase: float | None, min_top1: float | None, min_cosine: float | None = None
) -> Budget:
    """What quantization may cost, from the options that say it.

    Raises:
        OptionError: A limit is negative or not finite, or more agreement is asked for than there can be.
    """
    from hf_quant.evaluation.gate import Budget

    shares = {"min_top1": min_top1, "min_cosine": min_cosine}
    for name, limit in ({"max_kl": max_kl, "max_ppl_increase": max_ppl_increase} | shares).items():
        if limit is not None and not 0 <= limit < math.inf:
            raise OptionError(f"{name}: {limit!r} is not a number from 0")
        if limit is not None and name in shares and limit > 1:
            raise OptionError(f"{name}: {limit!r} is more than 100%; write 0.95 for 95%")
    return Budget(max_kl, max_ppl_increase, min_top1, min_cosine)


def check_device(device: str | None) -> str | None:
    """The device, if it is one; whether this machine has it is said here as far as that is known without torch.

    Raises:
        OptionError: There is no such kind of device, or no GPU here.
    """
    if device is None:
        return None
    name = re.sub(r"^(cuda|xpu)(\d+)$", r"\1:\2", {"gpu": "cuda", "rocm": "cuda", "mps:0": "mps"}.get(device, device))
    kind = name.partition(":")[0]
    if name != device:
        raise OptionError(f"--device {device!r}: did you mean {name}?")
    if kind not in DEVICES:
        raise OptionError(f"--device {device!r} is not one of {', '.join(DEVICES)}{suggestion(kind, DEVICES)}")
    if kind == "cuda" and sys.platform == "linux" and not any(Path("/dev", node).exists() for node in GPU_NODES):
        raise OptionError(f"--device {device}: this machine has no NVIDIA or AMD GPU; leave --device out for the CPU")
    if kind == "mps" and sys.platform != "darwin":
        raise OptionError(f"--device {device}: only Macs have it; leave --device out for the CPU")
    return device


def check_seed(seed: int) -> None:
    """Refuse a seed that random numbers cannot begin from.

    Raises:
        OptionError: It is negative, or too large.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise OptionError(f"--seed {seed}: must be a whole number from 0 to {LARGEST_SEED}")


def load_options(dtype: object, device: str | None, from_hub: Mapping[str, Any]) -> dict[str, Any]:
    """How the model is loaded, as arguments of ``from_pretrained``; ``from_hub`` as `hub` gives it.

    Raises:
        OptionError: There is no such type, or no such device.
    """
    return {"dtype": dtype_named(dtype)} | ({"device_map": check_device(device)} if device else {}) | dict(from_hub)


def dtype_of(load: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype in ``load``, as `load_options` gives it; None for that of config.json."""
    import torch

    return getattr(torch, load["dtype"], None)


def hub(revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """Where a model comes from and whether its code may run, as arguments of ``from_pretrained``."""
    return ({"revision": revision} if revision else {}) | ({"trust_remote_code": True} if trust_remote_code else {})
