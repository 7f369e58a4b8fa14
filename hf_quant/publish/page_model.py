"""What the report page shows: a model as its records describe it, and sample texts beside those of its base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_quant.errors import HfQuantError
from hf_quant.publish import sentences
from hf_quant.publish.facts import read_facts
from hf_quant.publish.markdown import plain


@dataclass(frozen=True)
class Sample:
    """What base and model continue one prompt with, greedily.

    Attributes:
        prompt: The text that both continue.
        base: Tokens of the base's continuation, as text.
        model: The same of the quantized model.
    """

    prompt: str
    base: Sequence[str]
    model: Sequence[str]

    @property
    def same(self) -> int:
        """How many tokens agree before the first that differs."""
        pairs = zip(self.base, self.model, strict=False)
        return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(self.base), len(self.model)))

    @property
    def identical(self) -> bool:
        """Whether all tokens agree."""
        return list(self.base) == list(self.model)


@dataclass(frozen=True)
class Model:
    """One model of the page.

    Attributes:
        folder: Where it is.
        name: Of the model, not of the folder.
        results: results.json, empty without one, like the next two.
        ladder: ladder.json, or what results.json holds of it.
        recipe: recipe.json.
    """

    folder: Path
    name: str
    results: Mapping[str, Any]
    ladder: Mapping[str, Any]
    recipe: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Model:
        """What is recorded in a folder.

        Raises:
            HfQuantError: There is neither results.json nor ladder.json, or one is damaged.
        """
        results, ladder, recipe = (read_facts(folder, name) or {} for name in ("results", "ladder", "recipe"))
        if not results and not ladder:
            raise HfQuantError(f"{folder}: neither results.json nor ladder.json; measure first, with eval or ladder")
        name = sentences.title(recipe) if recipe else folder.resolve().name
        return cls(folder, name, results, ladder or results.get("ladder") or {}, recipe)

    @property
    def base(self) -> str | None:
        """What it was made from."""
        return str(self.recipe["source"]["model"]) if self.recipe else None

    @property
    def link(self) -> str | None:
        """The base on the Hub; None if it was a folder."""
        return f"https://huggingface.co/{plain(self.base)}" if self.base and "/" in self.base else None

    @property
    def command(self) -> str | None:
        """What makes the same weights again."""
        return sentences.command(self.recipe) if self.recipe else None

    @property
    def loading(self) -> str:
        """The lines of Python that load it from where it is."""
        lines = sentences.loading(self.recipe, self.results)
        return (
            lines
            if self.recipe.get("repo_id")
            else lines.replace('"path/to/this/folder"', json.dumps(self.folder.resolve().name))
        )

    @property
    def recipe_json(self) -> str:
        """The recipe as it is in the file."""
        return json.dumps(self.recipe, indent=2, ensure_ascii=False) if self.recipe else ""
