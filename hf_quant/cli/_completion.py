"""What a shell completes after an option or in place of an argument; docs/guides/shell.md says how to switch it on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from hf_quant.core.k_quants import K_QUANTS

if TYPE_CHECKING:  # it became generic in click 8.2
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType

SCHEMES = (  # the usual ones; a scheme can have other numbers too
    "W8A16-g128", "W4A16-g128", "W4A16-g64", "W4A16-g32", "W4A16-g128-asym", "W4A16-g32-asym", "W3A16-g128", "W3A16-g64-asym",
    "W2A16-g64-asym", "W2A16-g32-asym", "W8A8", "W8A8-static", "W8A8-threshold", "W4A8-g128", *K_QUANTS,
)  # fmt: skip


class OneOf(ParamType):
    """A type whose values, or the usual ones among them, can be listed."""

    def words(self) -> Iterable[str]:
        """The values to offer."""
        raise NotImplementedError

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(word) for word in self.words() if word.lower().startswith(incomplete.lower())]


class Directory(ParamType):
    """A type whose values are mostly folders."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


def methods() -> Iterable[str]:
    """Presets and methods."""
    from hf_quant import _plugins
    from hf_quant.solve.recipes import PRESETS

    return sorted({*PRESETS, *_plugins.names("methods")})
