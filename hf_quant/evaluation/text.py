"""Held-out text as windows of tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_quant.errors import HfQuantError

SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Windows:
    """Attributes: ids ``[W, T]`` int64; documents: how many they come from; sha256: of the ids."""

    ids: Tensor
    documents: int
    sha256: str


def read_text(path: Path) -> str:
    """The file as UTF-8.

    Raises:
        HfQuantError: It is not; the message names the byte.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise HfQuantError(f"{path.name}: not UTF-8 at byte {error.start}") from None


def windows(tokenizer: Any, text: str, context: int, max_tokens: int | None = None) -> Windows:
    """Cut ``text`` into windows of ``context`` tokens; documents follow one another, the last partial window is left out.

    Args:
        tokenizer: Of the base model.
        text: Documents separated by ``<|endoftext|>``.
        context: Tokens in a window.
        max_tokens: Stop after about that many.

    Raises:
        HfQuantError: The text is shorter than one window.
    """
    if context < 2:
        raise HfQuantError(f"context must be at least 2 tokens, got {context}")
    limit = max_tokens or len(text)
    ids: list[int] = []
    count = 0
    for document in text.split(SEPARATOR):
        if len(ids) >= limit or not document.strip():
            continue
        ids += tokenizer(document.strip("\n") + "\n", verbose=False).input_ids
        count += 1
    whole = min(len(ids), max(limit, context)) // context
    if not whole:
        raise HfQuantError(f"the text has {len(ids)} tokens, fewer than one window of {context}")
    made = torch.tensor(ids[: whole * context]).view(whole, context)
    return Windows(made, count, hashlib.sha256(made.numpy().tobytes()).hexdigest())
