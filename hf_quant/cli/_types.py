"""Types of options: a value that makes no sense is refused while the command line is read, before torch is imported."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_quant import _plugins
from hf_quant.cli._completion import SCHEMES, Directory, OneOf, methods
from hf_quant.errors import HfQuantError, suggestion
from hf_quant.jobs.options import DTYPES, WANTED, check_device, check_model, no_folder, size_in_bytes

if TYPE_CHECKING:  # it became generic in click 8.2
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType


PYTHON = {"True": "true", "False": "false", "None": "null"}  # as strings, all of them would be true in a template
ELSEWHERE = ("gguf", "dense")  # what convert writes besides formats
GGUF_TYPE = re.compile(r"i?q\d.*|q\d-.*")
REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]{0,95}", re.ASCII)


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
            self.fail(f"{value!r} is not a number from 0; write for example 0.02", param, ctx)
        return number


class Scheme(OneOf):
    """A slug such as ``W4A16-g128``."""

    name = "scheme"

    def words(self) -> Iterable[str]:
        return SCHEMES

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from hf_quant.core.scheme import QuantScheme
        from hf_quant.solve.recipes import PRESETS

        saved = [name for name in _plugins.names("formats") if _plugins.constants("formats", name).get("saved")]
        for option, known in (("--method", {*PRESETS, *_plugins.names("methods")}), ("--format", saved)):
            if value in known:
                self.fail(f"{value!r} is not a scheme: say {option} {value} for that", param, ctx)
        return _checked(self, lambda: str(QuantScheme.parse(value)), param, ctx)


class Method(OneOf):
    """A preset, a method, or transforms and a method joined by ``+``."""

    name = "method"

    def words(self) -> Iterable[str]:
        return methods()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from hf_quant.core.scheme import QuantScheme
        from hf_quant.solve.recipes import Decision

        name = str(value).lower()
        _checked(self, lambda: Decision.of(name, [QuantScheme(4)]), param, ctx)
        return name


class Named(OneOf):
    """One of a few names; some of them may be spelled in more than one way."""

    name = "name"

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def words(self) -> Iterable[str]:
        return dict.fromkeys(self.names.values())

    def get_metavar(self, param: click.Parameter, ctx: Any = None) -> str:
        return f"[{'|'.join(self.words())}]"

    def hint(self, value: str) -> str:
        """The end of the message about ``value``, which is no name."""
        return suggestion(value, self.names)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        value_named = self.names.get(str(value).lower())
        if value_named is None:
            listed = ", ".join(dict.fromkeys(self.names.values()))
            self.fail(f"{value!r} is not one of {listed}{self.hint(str(value))}", param, ctx)
        return value_named


class Choice(Named):
    """One of a few names, in capitals or not."""

    def __init__(self, *names: str) -> None:
        super().__init__({name: name for name in names})


class Bits(Named):
    """A width of codes, also as ``4bit`` or ``int4``."""

    name = "bits"

    def __init__(self) -> None:
        super().__init__(
            {form.format(bits): str(bits) for bits in (8, 4, 3, 2) for form in ("{}", "{}bit", "{}-bit", "int{}")}
        )

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return int(super().convert(value, param, ctx))


def _checked(kind: ParamType, read: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
    try:
        return read()
    except HfQuantError as error:
        kind.fail(str(error), param, ctx)


class Dtype(Named):
    """What a model computes in."""

    def hint(self, value: str) -> str:
        from hf_quant.core.scheme_names import equivalent

        if close := suggestion(value, self.names):
            return close
        scheme = equivalent(value)
        return f"; that is what the model computes in; for its weights there is --scheme: {scheme}" if scheme else ""


DTYPE = Dtype(DTYPES)


class Format(OneOf):
    """A format with a certain trait, by its name or its label, or one of a few other words.

    Args:
        trait: ``"saved"``: what ``save_pretrained`` writes; ``"converted_to"``: what ``hf-quant convert`` writes.
        others: Words besides.
        advice: How to get a format that lacks the trait.
    """

    name = "format"

    def __init__(self, trait: str, others: tuple[str, ...], advice: str) -> None:
        self.trait, self.others, self.advice = trait, others, advice

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        able = list(self.words())
        word = str(value).lower().replace("_", "-")
        if word in able:
            return word
        hint = (
            f"; {self.advice.format(word)}"
            if word in {*self._labels().values(), *ELSEWHERE}
            else suggestion(word, able)
        )
        if GGUF_TYPE.fullmatch(word):
            hint = (
                "; that is a type inside GGUF files: quantize --scheme Q4_K makes one, and convert --to gguf keeps it"
            )
        return self.fail(f"{value!r} is not one of {', '.join(able)}{hint}", param, ctx)

    def words(self) -> Iterable[str]:
        return [*self.others, *(label for name, label in self._labels().items() if self._is_able(name))]

    def _labels(self) -> dict[str, str]:
        return {
            name: str(_plugins.constants("formats", name).get("label", name)) for name in _plugins.names("formats")
        }

    def _is_able(self, name: str) -> bool:
        """Read from the source of the format, since importing it takes seconds; those of other packages have to be imported."""
        declared = _plugins.constants("formats", name)
        return bool(
            declared.get(self.trait) if declared else getattr(_plugins.load("formats", name).FORMAT, self.trait)
        )


SAVED = Format("saved", ("auto",), "hf-quant convert --to {} makes it of the result")
TARGET = Format("converted_to", ELSEWHERE, "it is read, and not written")


class Override(ParamType):
    """``GLOB=SCHEME``, or ``GLOB=float`` for layers that stay in floating point."""

    name = "override"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str | None]:
        glob, equals, slug = str(value).partition("=")
        if not equals or not glob:
            self.fail(
                f"{value!r} is not GLOB=SCHEME; write for example '{glob or '*.down_proj'}=W8A16-g128'", param, ctx
            )
        return glob, None if slug == "float" else Scheme().convert(slug, param, ctx)


class TemplateArguments(ParamType):
    """``KEY=VALUE``, whose value is JSON or else a string; or a JSON object."""

    name = "template arguments"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        whole = _json(str(value))
        if isinstance(whole, dict):
            return whole
        key, equals, text = str(value).partition("=")
        if not equals or not key.isidentifier():
            self.fail(f"{value!r} is not KEY=VALUE; write for example enable_thinking=false", param, ctx)
        return {key: _json(PYTHON.get(text, text))}


def _json(text: str) -> Any:
    """What ``text`` means as JSON; itself where it is none, such as NaN."""
    try:
        return json.loads(text, parse_constant=lambda _: text)
    except (ValueError, RecursionError):
        return text


class Model(Directory):
    """A folder or a Hub id. What is neither is told apart from a model, with what to do about it."""

    name = "model"
    what = WANTED[0].upper() + WANTED[1:]

    def __init__(self, *, gguf: bool = False) -> None:
        self.gguf = gguf

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value) if self.gguf and str(value).lower().endswith(".gguf") else check_model(str(value))


class Folder(Directory):
    """A folder that is there, with a quantized model in it."""

    name = "folder"
    what = "Name the folder of a model that hf-quant has quantized"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        if path.is_file():
            self.fail(f"{value}: a file, not a folder", param, ctx)
        if not path.is_dir():
            self.fail(f"{value}: {no_folder(path, 'name the folder of a quantized model')}", param, ctx)
        return path


class Device(ParamType):
    """Where a model computes, as torch and accelerate call it."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(_checked(self, lambda: check_device(str(value)), param, ctx))


class RepoId(ParamType):
    """A repository of the Hub, ``owner/name``."""

    name = "repo id"
    what = "Name the repository on the Hub, such as owner/name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        word = str(value).removeprefix("https://huggingface.co/").removeprefix("hf://").strip("/")
        good = re.sub(r"[^\w./-]+", "-", word, flags=re.ASCII).strip("-.")
        if word != value and re.fullmatch(REPO_ID, word):
            self.fail(f"{value!r} is an address; did you mean {word}?", param, ctx)
        if "/" not in word:
            self.fail(
                f"{value!r} names no owner: write owner/{good or 'name'}, with your name or your organization's",
                param,
                ctx,
            )
        if not re.fullmatch(REPO_ID, word) or ".." in word or "--" in word:
            hint = f"; did you mean {good}?" if re.fullmatch(REPO_ID, good) and good != word else ""
            self.fail(f"{value!r} is not owner/name, of letters, digits, '-', '_' and '.'{hint}", param, ctx)
        return word
