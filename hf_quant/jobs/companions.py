"""Small files that belong to a model beside its weights and its config.json: tokenizer, chat template, preprocessors, the
pooling of a sentence encoder.

Only kinds of files that are known to belong to models are copied, since a folder may hold anything else too (texts,
results, states of a training), and a link is followed only inside the model's own folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from hf_quant.disk.atomic import copy_file, make_folder
from hf_quant.jobs.outputs import RECORDS, shown

LARGEST = 200_000_000  # bytes of one file
SUFFIXES = (".json", ".jinja", ".model", ".spm", ".tiktoken", ".bpe")
VOCABULARY = re.compile(r"(vocab|merges|dict|bpe|special_tokens)[\w.-]*\.(txt|codes)", re.ASCII)
NOTICE = re.compile(r"(licen[cs]e|notice|copying|use_policy)[\w-]*(\.(txt|md))?", re.ASCII | re.IGNORECASE)
FOREIGN = re.compile(  # what says something of other weights, of a training, or of what was measured
    r"config\.json|.*\.index(\.\w+)?\.json|quant(ize)?_config\.json|quanto_qmap\.json|adapter_config\.json|manifest\.json"
    r"|(trainer_state|training_args|all_results|train_results|eval_results|results|ladder)\.json"
)
PARTS = "modules.json"  # of a sentence encoder: folders that are run after the model
TEMPLATES = "additional_chat_templates"
PATTERNS = [*(f"*{suffix}" for suffix in SUFFIXES), "*.txt", "*.codes", "*.py", "*/*.safetensors"]  # to download


def copy_companions(
    source: Path, stage: Path, say: Callable[[str], None], *, notices: bool = False, code: bool = False
) -> None:
    """Copy the small files of a model into the folder of another one made from it; what is there already stays.

    Args:
        source: Folder of the model.
        stage: Folder of the new one.
        say: Told of what is left out though it belongs to the model.
        notices: Whether to copy licence texts too.
        code: Whether to copy the model's own code too, if its config.json names some. Nothing here runs it.

    Raises:
        DiskError: Names what could not be written.
    """
    for name in companions(source, notices=notices, code=code):
        if (stage / name).exists():
            continue
        if (reason := _why_not(source, source / name)) is not None:
            say(f"{shown(source / name)}: {reason}, so it is not copied")
            continue
        make_folder((stage / name).parent)
        copy_file(source / name, stage / name)


def companions(source: Path, *, notices: bool = False, code: bool = False) -> list[str]:
    """Names of the small files that belong to a model, relative to its folder and sorted; arguments as above."""
    code = code and _has_code(source)
    top = {path.name for path in source.iterdir() if _belongs(path, notices, code) and path.is_file()}
    return sorted(top | {path.relative_to(source).as_posix() for part in _parts(source) for path in _files(part)})


def _belongs(path: Path, notices: bool, code: bool) -> bool:
    if path.name in RECORDS or path.name.startswith(".") or FOREIGN.fullmatch(path.name):
        return False
    known = path.suffix in SUFFIXES or VOCABULARY.fullmatch(path.name) is not None
    return known or (notices and NOTICE.fullmatch(path.name) is not None) or (code and path.suffix == ".py")


def _has_code(source: Path) -> bool:
    config = _read(source / "config.json")
    return isinstance(config, dict) and "auto_map" in config


def _parts(source: Path) -> Iterator[Path]:
    """Folders that belong to the model."""
    yield source / TEMPLATES
    parts = _read(source / PARTS)
    for part in parts if isinstance(parts, list) else ():
        name = part.get("path") if isinstance(part, dict) else None
        if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name):  # a name, and no way out of the folder
            yield source / name


def _files(part: Path) -> Iterator[Path]:
    """Files of a part; its weights in safetensors belong to it, pickles are left behind."""
    for folder, _, names in os.walk(part):  # follows no link
        for name in names:
            path = Path(folder, name)
            if path.is_file() and (path.suffix in (*SUFFIXES, ".safetensors") or VOCABULARY.fullmatch(name)):
                yield path


def _why_not(source: Path, path: Path) -> str | None:
    """Why a file is not copied; None if it is."""
    if not inside(path, source):
        return "is a link out of the model's folder"
    if path.stat().st_size > LARGEST:
        return f"has more than {LARGEST:,} bytes"
    return None


def inside(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder, wherever links lead; the Hub's cache keeps the files of a snapshot beside it."""
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    return home in real.parents or blobs in real.parents


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
