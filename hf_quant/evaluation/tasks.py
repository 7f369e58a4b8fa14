"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), if it is installed."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from hf_quant.data.chat import Chat
from hf_quant.errors import HfQuantError

MISSING = "--tasks needs lm-evaluation-harness: pip install 'hf-quant[tasks]'"


def refuse_tasks(model: str, tokenizer: Any) -> None:
    """Refuse tasks before anything is measured where they cannot be asked.

    Raises:
        HfQuantError: The model has no tokenizer, or lm-eval is not installed.
    """
    if tokenizer is None:
        raise HfQuantError(f"--tasks asks questions in text, and {model} has no tokenizer: leave --tasks out")
    if find_spec("lm_eval") is None:
        raise HfQuantError(MISSING)


def run_tasks(model: Any, chat: Chat, names: Sequence[str], limit: int | None = None) -> dict[str, dict[str, float]]:
    """Every number of every task: ``{"arc_easy": {"acc": 0.61, "acc_stderr": 0.01}}``; ``{"exact_match,strict-match": ...}`` of several filters.

    Args:
        model: A causal language model.
        chat: Its tokenizer; where arguments of the chat template are given, questions are asked through that.
        names: Names of tasks, or paths of their YAML files.
        limit: Examples of each task; None for all.

    Raises:
        HfQuantError: lm-eval is not installed, or knows no task of that name.
    """
    try:
        from lm_eval import simple_evaluate  # type: ignore[import-not-found,unused-ignore]
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise HfQuantError(f"{MISSING} ({error})") from None
    try:
        report = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=_with_arguments(chat)), tasks=list(names), limit=limit,
            apply_chat_template=chat.arguments is not None,
        )  # fmt: skip
    except KeyError as error:
        raise HfQuantError(f"lm-eval: {error}") from None
    results: dict[str, dict[str, Any]] = report["results"]
    return {task: _numbers(row) for task, row in results.items()}


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a task by the names of its metrics; with that of the filter where a metric has several."""
    numbers = {name: value for name, value in row.items() if isinstance(value, float)}
    filters = Counter(name.partition(",")[0] for name in numbers)
    return {
        name if filters[metric] > 1 else metric: value
        for name, value in numbers.items()
        if (metric := name.partition(",")[0])
    }


def _with_arguments(chat: Chat) -> Any:
    """The tokenizer; its chat template is given the arguments whoever applies it, since not every lm-eval hands some on."""
    if not chat.arguments:
        return chat.tokenizer
    tokenizer = copy.copy(chat.tokenizer)
    tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, **chat.arguments)
    return tokenizer
