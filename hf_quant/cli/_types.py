"""Types of options: a value that makes no sense is refused while the command line is read, before torch is imported."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from hf_quant.errors import HfQuantError
from hf_quant.jobs.options import DTYPES, check_model, size_in_bytes

if TYPE_CHECKING:  # it became generic in click 8.2
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType


class Size(ParamType):
    """Bytes: ``4GB``, ``512MiB``, ``4G`` or a plain number."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return int(_checked(self, lambda: size_in_bytes(value), param, ctx))


class Share(ParamType):
    """A share of one: ``1%`` or ``0.01``. A plain number of one and more is refused, since it was probably meant in percent."""

    name = "share"

    def __init__(self, most: float = math.inf) -> None:
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text, percent = str(value).strip().removesuffix("%"), str(value).strip().endswith("%")
        try:
            number = float(text) / (100 if percent else 1)
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            self.fail(f"{value!r} is not a share; write for example 1% or 0.01", param, ctx)
        if not percent and number >= 1:
            self.fail(f"{value!r} could mean {text}% or {number:.0%}: write it with a percent sign", param, ctx)
        if number > self.most:
            self.fail(f"{value!r} is more than {self.most:.0%}", param, ctx)
        return number


class Limit(ParamType):
    """A finite number that is not negative."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            self.fail(f"{value!r} is not a number from 0", param, ctx)
        return number


class Scheme(ParamType):
    """A slug such as ``W4A16-g128``."""

    name = "scheme"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from hf_quant.core.scheme import QuantScheme

        return _checked(self, lambda: str(QuantScheme.parse(value)), param, ctx)


class Method(ParamType):
    """A preset, a method, or transforms and a method joined by ``+``."""

    name = "method"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from hf_quant.core.scheme import QuantScheme
        from hf_quant.solve.recipes import Decision

        _checked(self, lambda: Decision.of(value, [QuantScheme(4)]), param, ctx)
        return str(value)


class Named(ParamType):
    """One of a few names; some of them may be spelled in more than one way."""

    name = "name"

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        value_named = self.names.get(str(value).lower())
        if value_named is None:
            self.fail(f"{value!r} is not one of {', '.join(dict.fromkeys(self.names.values()))}", param, ctx)
        return value_named


def _checked(kind: ParamType, read: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
    try:
        return read()
    except HfQuantError as error:
        kind.fail(str(error), param, ctx)


DTYPE = Named(DTYPES)


class Format(ParamType):
    """``auto``, or a format that ``save_pretrained`` writes, by its name or its label."""

    name = "format"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value == "auto":
            return "auto"
        from hf_quant.formats import saved_formats

        name = str(value).lower().replace("-", "_")
        if name not in saved_formats():
            self.fail(f"{value!r} is not one of auto, {', '.join(saved_formats())}", param, ctx)
        return name


class Override(ParamType):
    """``GLOB=SCHEME``, or ``GLOB=float`` for layers that stay in floating point."""

    name = "override"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str | None]:
        glob, equals, slug = str(value).partition("=")
        if not equals or not glob:
            self.fail(f"{value!r} is not GLOB=SCHEME", param, ctx)
        return glob, None if slug == "float" else Scheme().convert(slug, param, ctx)


class Model(ParamType):
    """A folder or a Hub id. What is neither is told apart from a model, with what to do about it."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return check_model(str(value))
