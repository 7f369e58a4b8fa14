"""Conversations become text, with arguments of the chat template that are known to do something."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import click
import pytest

from hf_quant.cli._types import TemplateArguments
from hf_quant.data.calibration import calibration
from hf_quant.data.chat import Chat, may_hold_chats
from hf_quant.data.text import SEPARATOR, documents, paragraphs, read_documents, refuse_overlap, split, windows
from hf_quant.errors import HfQuantError, OptionError, PlanError
from hf_quant.evaluation.tasks import _numbers, run_tasks
from hf_quant.hf import HfQuantConfig
from hf_quant.jobs.texts import template_arguments
from tests import yardsticks

(MESSAGES,) = yardsticks.chats(3, 1)
THOUGHT = "<|im_start|>user\n3 fir?<|im_end|>\n<|im_start|>assistant\n<think>fir 3</think>3.<|im_end|>\n"
SILENT = THOUGHT.replace("<think>fir 3</think>", "")


def tokenizer(template: Any = yardsticks.TEMPLATE) -> Any:
    chatting = yardsticks.chat_tokenizer()
    chatting.chat_template = template
    return chatting


def test_arguments_change_the_text() -> None:
    assert Chat(tokenizer()).text_of(MESSAGES) == THOUGHT
    assert Chat(tokenizer(), {"enable_thinking": True}).text_of(MESSAGES) == THOUGHT
    assert Chat(tokenizer(), {"enable_thinking": False}).text_of(MESSAGES) == SILENT
    question = "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    assert Chat(tokenizer(), {"enable_thinking": False}).question("why?") == f"{question}<think></think>"
    assert Chat(tokenizer(), {}).question("why?") == question
    assert Chat(tokenizer()).question("why?") == "why?", "nobody asked for the template"


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("{% if thinking is not defined %}{% set thinking = false %}{% endif %}{{ thinking }}", {"thinking"}),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ effort }}{% endfor %}", {"effort"}),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{{ style }}{% endgeneration %}{% endfor %}",
            {"style"},
        ),
        ("{% macro show(x) %}{{ x }}{{ tone }}{% endmacro %}{{ show(bos_token) }}{{ strftime_now('%Y') }}", {"tone"}),
        ("{% set ns = namespace(a=effort) %}{{ ns.a }}{{ raise_exception('no') if kind == 'x' }}", {"effort", "kind"}),
        ("{{ tools }}{{ documents }}", {"tools", "documents"}),
    ],
)
def test_every_argument_that_a_template_mentions_is_taken_and_no_other(template: str, names: set[str]) -> None:
    for name in names:
        Chat(tokenizer(template), {name: []})
    for other in ("enable_thinkin", "m", "x", "loop", "ns", "range", "raise_exception", "strftime_now"):
        with pytest.raises(HfQuantError, match=rf"never mentions '{other}'.*its arguments are: .*{max(names)}"):
            Chat(tokenizer(template), {other: True})


def test_named_templates() -> None:
    several = {
        "default": "{{ plain }}",
        "tool_use": "{{ tools | tojson }}{{ strict }}",
        "rag": "{{ documents }}{{ cite }}",
    }
    Chat(tokenizer(several), {"plain": 1})
    tool = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    assert Chat(tokenizer(several), {"tools": tool, "strict": 7}).text_of(MESSAGES).endswith("]7")
    assert Chat(tokenizer(several), {"chat_template": "rag", "cite": "see"}).text_of(MESSAGES).endswith("see")
    for wrong in ({"strict": 1}, {"plain": 1, "tools": tool}, {"chat_template": "rag", "plain": 1}):
        with pytest.raises(HfQuantError, match="never mentions"):
            Chat(tokenizer(several), wrong)
    for wrong in ({"chat_template": "other"}, {"chat_template": 3}):
        with pytest.raises(HfQuantError, match="no chat template of that name; there is default, rag, tool_use"):
            Chat(tokenizer(several), wrong)
    with pytest.raises(HfQuantError, match="has one chat template"):
        Chat(tokenizer(), {"chat_template": "rag"})
    without = {name: several[name] for name in ("tool_use", "rag")}
    with pytest.raises(HfQuantError, match="multiple chat templates with no default"):
        Chat(tokenizer(without), {"cite": 1})


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(HfQuantError, match=r"never mentions 'enable_thinkin'; did you mean enable_thinking\?"):
        Chat(tokenizer(), {"enable_thinkin": False})
    for none in (tokenizer(None), None, SimpleNamespace()):
        for arguments in ({}, {"enable_thinking": False}):
            with pytest.raises(HfQuantError, match="has no chat template"):
                Chat(none, arguments)
        Chat(none)
    for name in ("messages", "add_generation_prompt", "continue_final_message"):
        with pytest.raises(HfQuantError, match=f"{name} is decided by"):
            Chat(tokenizer(), {name: True})
    with pytest.raises(HfQuantError, match=r"the chat template: .*endfor"):
        Chat(tokenizer("{% for m in messages %}"), {"a": 1})
    used = Chat(tokenizer(), {"enable_thinking": False})
    with pytest.raises(HfQuantError, match="none of the texts holds messages"):
        used.refuse_unused()
    used.text_of(MESSAGES)
    used.refuse_unused()
    Chat(tokenizer()).refuse_unused()


def test_nothing_that_applies_a_template_is_asked_for(tmp_path: Path) -> None:
    text, chats = tmp_path / "a.txt", tmp_path / "a.jsonl"
    for file in (text, chats):
        file.write_text("x")
    for source in (str(chats), "owner/set.v2:config@train#messages"):
        assert may_hold_chats(source) and template_arguments({"a": 1}, [None, source]) == {"a": 1}
    for source in (str(text), None, [{"input_ids": 1}], str(tmp_path / "ids.safetensors")):
        assert not may_hold_chats(source) and template_arguments(None, [source]) is None
        with pytest.raises(OptionError, match="nothing here applies a chat template"):
            template_arguments({"a": 1}, [source])
    assert template_arguments({}, [], asked=True) == {}
    with pytest.raises(OptionError, match="that JSON can hold"):
        template_arguments({"a": {1, 2}}, [], asked=True)
    for calibrated_on in (None, str(text), ["one", "two"]):
        with pytest.raises(PlanError, match=r"quantization_config.chat_template_kwargs: nothing here applies"):
            HfQuantConfig(method="gptq", calibration=calibrated_on, chat_template_kwargs={"a": 1})
    with pytest.raises(PlanError, match="must be a Mapping"):
        HfQuantConfig(method="gptq", calibration=str(chats), chat_template_kwargs=["a"])  # type: ignore[arg-type]
    config = HfQuantConfig(method="gptq", calibration=str(chats), chat_template_kwargs={"a": 1})
    assert "chat_template_kwargs" not in config.to_dict() and "chat_template" not in repr(config)


def test_what_a_template_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(MESSAGES) + "\n" + json.dumps(MESSAGES[:1]))
    picky = tokenizer("{{ raise_exception('roles must alternate') if messages | length < 2 }}ok")
    with pytest.raises(HfQuantError, match=r"a.jsonl: line 2: the chat template: roles must alternate"):
        read_documents(tmp_path / "a.jsonl", Chat(picky))
    with pytest.raises(HfQuantError, match=r"dataset set: row 1: the chat template: roles must alternate"):
        documents("set", [MESSAGES, MESSAGES[:1]], Chat(picky))
    with pytest.raises(HfQuantError, match=r"the prompt 'why\?': the chat template: roles must alternate"):
        Chat(picky, {}).question("why?")


def test_a_conversation_stays_one_document_with_all_its_tokens(tmp_path: Path) -> None:
    """Some templates end each turn with what separates documents elsewhere."""
    turns = tokenizer("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": MESSAGES}) + '\n{"text": "one<|endoftext|>two"}\n')
    texts = split(read_documents(tmp_path / "a.jsonl", Chat(turns)))
    assert texts == [f"3 fir?{SEPARATOR}3.{SEPARATOR}", "one\n", "two\n"]
    made = windows(turns, texts, 10)
    assert made.ids.flatten().tolist().count(2) == 2 and made.document.unique().tolist() == [0]


def test_overlap_is_that_of_the_rendered_text(tmp_path: Path) -> None:
    """Conversations shorter than a paragraph count as a whole; what is rendered in another way is another text."""
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(messages) for messages in yardsticks.chats(0, 60)))
    on = calibration(tmp_path / "a.jsonl", tokenizer(), 32, 10_000, 512, Chat(tokenizer(), {"enable_thinking": True}))
    assert on.to_dict()["chat_template_kwargs"] == {"enable_thinking": True} and len(on.paragraphs) == 60
    with pytest.raises(
        HfQuantError, match="60 of 60 paragraphs of the evaluation text also occur in the calibration or training data"
    ):
        refuse_overlap(read_documents(tmp_path / "a.jsonl", Chat(tokenizer())), on.paragraphs)
    refuse_overlap(read_documents(tmp_path / "a.jsonl", Chat(tokenizer(), {"enable_thinking": False})), on.paragraphs)
    other = calibration(
        tmp_path / "a.jsonl", tokenizer(), 32, 10_000, 512, Chat(tokenizer(), {"enable_thinking": False})
    )
    assert other.sha256 != on.sha256, "the journal of a run that was stopped goes by that"
    plain = calibration(["hello " * 40, "world " * 40], tokenizer(), 32, 10_000, 512, Chat(tokenizer(), {}))
    assert "chat_template_kwargs" not in plain.to_dict()
    assert not paragraphs(["Thanks!", "Hello"]), "what everybody says"


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("enable_thinking=false", {"enable_thinking": False}),
        ("enable_thinking=False", {"enable_thinking": False}),
        ("reasoning_effort=high", {"reasoning_effort": "high"}),
        ("reasoning_effort=none", {"reasoning_effort": "none"}),
        ("budget=128", {"budget": 128}),
        ("date=2024-07-26", {"date": "2024-07-26"}),
        ("a=b=c", {"a": "b=c"}),
        ("a=", {"a": ""}),
        ("a=NaN", {"a": "NaN"}),
        ('a="False"', {"a": "False"}),
        ('tools=[{"type": "function"}]', {"tools": [{"type": "function"}]}),
        ('{"enable_thinking": false, "b": "c=d"}', {"enable_thinking": False, "b": "c=d"}),
        ("{}", {}),
    ],
)
def test_arguments_on_the_command_line(words: str, meant: dict[str, Any]) -> None:
    assert TemplateArguments().convert(words, None, None) == meant


@pytest.mark.parametrize("words", ["enable_thinking", "=1", "a b=1", "{", '{"a": 1', "[1]", "3", ""])
def test_what_is_no_argument(words: str) -> None:
    with pytest.raises(click.BadParameter, match="is not KEY=VALUE; write for example enable_thinking=false"):
        TemplateArguments().convert(words, None, None)


def test_a_metric_of_several_filters_keeps_all_its_numbers() -> None:
    row = {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 0.7, "acc,none": 0.6, "alias": "gsm8k"}
    assert _numbers(row) == {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 0.7, "acc": 0.6}


def test_tasks_are_asked_through_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for lm-eval, which calls the tokenizer as the real one does."""
    asked: list[Any] = []

    def simple_evaluate(model: Any, tasks: list[str], limit: Any, apply_chat_template: bool) -> Any:
        asked.append(
            model.tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True)
            if apply_chat_template else None
        )  # fmt: skip
        return {"results": {tasks[0]: {"acc,none": 0.5, "alias": "x"}}}

    lm_eval, models, huggingface = (ModuleType(f"lm_eval{part}") for part in ("", ".models", ".models.huggingface"))
    lm_eval.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    huggingface.HFLM = lambda pretrained, tokenizer: SimpleNamespace(tokenizer=tokenizer)  # type: ignore[attr-defined]
    for module in (lm_eval, models, huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    chatting = tokenizer()
    for arguments in (None, {}, {"enable_thinking": False}):
        assert run_tasks(None, Chat(chatting, arguments), ["t"]) == {"t": {"acc": 0.5}}
    question = "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    assert asked == [None, question, f"{question}<think></think>"]
    assert "<think>" not in chatting.apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True
    ), "the tokenizer of the caller stays as it is"
