"""Conversations become text by the chat template of a tokenizer, with arguments of the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from hf_quant.errors import HfQuantError, suggestion

NOTHING_ASKED = "nothing here applies a chat template; a JSONL file or a data set of messages does"
OURS = ("messages", "add_generation_prompt", "continue_final_message")  # what each use of the template decides
OF_RENDERING = ("raise_exception", "strftime_now", *jinja2.Environment().globals)  # in every template


def may_hold_chats(source: Any) -> bool:
    """Whether a source of text can hold conversations: a JSONL file, the name of a data set, or rows that are no strings."""
    if not isinstance(source, str | Path):
        from hf_quant.data.batches import are_batches  # which needs torch

        rows = source if isinstance(source, list) and not are_batches(source) else []
        return not all(isinstance(row, str) for row in rows)
    path = Path(source)
    return path.suffix == ".jsonl" or not (path.suffix in (".txt", ".md", ".safetensors") or path.is_file())


@dataclass
class Chat:
    """How conversations become text.

    Attributes:
        tokenizer: Its chat template is applied; a tokenizer without one, or None, joins the contents of messages by newlines.
        arguments: Of the template, besides the messages, such as ``{"enable_thinking": False}``; of several templates
            ``chat_template`` names the one to apply. None where nobody gave any.
        applied: How many conversations were rendered.

    Raises:
        HfQuantError: Arguments are given, and there is no template or it has no such argument.
    """

    tokenizer: Any
    arguments: Mapping[str, Any] | None = None
    applied: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.arguments is None:
            return
        if not self._has_template():
            raise HfQuantError("--chat-template-kwargs: the tokenizer of this model has no chat template")
        known = self._variables() - {*OURS, *OF_RENDERING}
        for name in self.arguments:
            if name in OURS:
                raise HfQuantError(f"--chat-template-kwargs: {name} is decided by what the template is applied to")
            if name not in known and name != "chat_template":
                listed = ", ".join(sorted(known - set(getattr(self.tokenizer, "special_tokens_map", ())))) or "none"
                raise HfQuantError(
                    f"--chat-template-kwargs: the chat template never mentions {name!r}{suggestion(name, known)}; its arguments "
                    f"are: {listed}"
                )

    def text_of(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A conversation as text.

        Raises:
            ValueError: The template refuses it.
        """
        if not self._has_template():
            return "\n".join(message["content"] for message in messages)
        return self._rendered(messages, add_generation_prompt=False)

    def question(self, prompt: str) -> str:
        """A prompt as the user's message, up to where the answer begins; as it is where no arguments are given."""
        if self.arguments is None:
            return prompt
        try:
            return self._rendered([{"role": "user", "content": prompt}], add_generation_prompt=True)
        except ValueError as error:
            raise HfQuantError(f"the prompt {prompt!r}: {error}") from None

    def refuse_unused(self) -> None:
        """Refuse arguments where no text held a conversation."""
        if self.arguments is not None and not self.applied:
            raise HfQuantError(
                "--chat-template-kwargs: none of the texts holds messages, so no chat template was applied"
            )

    def to_dict(self, since: int) -> dict[str, Any]:
        """For the recipe of what was made from a text: the arguments, if it is one of the conversations ``since`` so many."""
        return {"chat_template_kwargs": dict(self.arguments)} if self.arguments and self.applied > since else {}

    def _has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def _rendered(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        options = {"add_generation_prompt": True} if add_generation_prompt else {}
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options, **(self.arguments or {}))
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the chat template: {error}") from None
        self.applied += 1
        return _without_bos(str(text), self.tokenizer)

    def _variables(self) -> set[str]:
        """What the template that will be applied asks for."""
        arguments, templates = self.arguments or {}, self.tokenizer.chat_template
        if "chat_template" in arguments and not isinstance(templates, dict):
            raise HfQuantError("--chat-template-kwargs: the tokenizer has one chat template: leave chat_template out")
        if arguments.get("chat_template") not in (None, *templates):
            raise HfQuantError(
                f"--chat-template-kwargs: no chat template of that name; there is {', '.join(sorted(templates))}"
            )
        try:
            source = self.tokenizer.get_chat_template(arguments.get("chat_template"), tools=arguments.get("tools"))
            return meta.find_undeclared_variables(_PARSER.parse(source))
        except (ValueError, TypeError, jinja2.TemplateError) as error:
            raise HfQuantError(f"--chat-template-kwargs: the chat template: {error}") from None


class _Generation(Extension):
    """The tag ``generation``, by which transformers finds what an assistant said."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_PARSER = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation])  # only parses, so nothing is escaped


def _without_bos(text: str, tokenizer: Any) -> str:
    """Most chat templates write the BOS token, which the tokenizer would add a second time."""
    first: str | None = getattr(tokenizer, "bos_token", None)
    if first is None or tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]:
        return text
    return text.removeprefix(first)
