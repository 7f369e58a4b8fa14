"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), if it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_quant.errors import HfQuantError


def run_tasks(
    model: Any, tokenizer: Any, names: Sequence[str], limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Every number of every task: ``{"arc_easy": {"acc": 0.61, "acc_stderr": 0.01}}``.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        names: Names of tasks, or paths of their YAML files.
        limit: Examples of each task; None for all.

    Raises:
        HfQuantError: lm-eval is not installed, or knows no task of that name.
    """
    try:
        from lm_eval import simple_evaluate  # type: ignore[import-not-found,unused-ignore]
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise HfQuantError(f"--tasks needs lm-evaluation-harness: pip install 'hf-quant[tasks]' ({error})") from None
    try:
        report = simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(names), limit=limit)
    except KeyError as error:
        raise HfQuantError(f"lm-eval: {error}") from None
    results: dict[str, dict[str, Any]] = report["results"]
    return {
        task: {name.partition(",")[0]: value for name, value in row.items() if isinstance(value, float)}
        for task, row in results.items()
    }
