"""Cards: every number was measured, nothing of a stranger's text takes effect, and what was not measured is said."""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import hf_quant.publish
from hf_quant.core.scheme import QuantScheme
from hf_quant.disk.digests import measured_files
from hf_quant.errors import HfQuantError, PushError
from hf_quant.formats._compressed_tensors_config import config_of
from hf_quant.publish import card, licence
from hf_quant.publish.facts import check_facts
from hf_quant.publish.page import html_page
from hf_quant.publish.source import describe, metadata

from .conftest import REPO, VALIDATES, run
from .fakehub import FakeHub

CARDS = sorted(path.parent for path in (REPO / "model_cards").glob("*/facts.json"))
WORDS = {"95", "top-1", "bfloat16"}  # the template's own: the level of intervals, names of a measure and of a dtype
UNITS = {"%": (100, 50), "MB": (1e-6,), "GB": (1e-9,), "kB": (1e-3,)}  # 50: half an interquartile range


def leaves(record: Any) -> Iterator[Any]:
    if isinstance(record, dict):
        for key, value in record.items():
            yield from (int(part) for part in re.findall(r"\d+", key))  # kl_p99
            yield from leaves(value)
    elif isinstance(record, list):
        for value in record:
            yield from leaves(value)
    elif isinstance(record, str):
        yield from map(float, re.findall(r"(?<![\w.-])\d+\.\d+(?![\w.-])", record))  # sentences about what is slower
    elif isinstance(record, (int, float)) and not isinstance(record, bool):
        yield record


def untraceable(text: str, recipe: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """Everything with a digit in it that is neither a word of the two files nor one of their numbers, rounded."""
    words, numbers = json.dumps([recipe, results]), {*leaves(recipe), *leaves(results)}
    numbers |= set(
        Counter(recipe["schemes"].values()).values()
    )  # what the card works out itself: this, ratios of sizes and speeds, and a product
    if "bytes" in results:
        numbers.add(results["bytes"] / results["base_bytes"])
    if "base" in (results.get("bench") or {}):
        speeds = [results["bench"][role]["speed"][0] for role in ("model", "base")]
        numbers |= {speeds[0][what] / speeds[1][what] for what in ("prefill", "decode")}
    if recipe.get("calibration"):
        numbers.add(recipe["calibration"]["sequences"] * recipe["calibration"]["context"])
    text, made = re.sub(r"\]\([^)]*\)", "]", card.SEAL.sub("", text)), []
    for match in re.finditer(r"(?<![\w.])[\w.,+-]*\d[\w.,+-]*(?: (%|MB|GB|kB))?", text):
        token, unit = match[0].removesuffix(f" {match[1]}").strip(".,-"), match[1]
        number = re.fullmatch(r"-?(\d[\d,]*)(\.\d+)?(M|e-?\d+)?", token)
        if number is None:
            if token not in words and token not in WORDS and json.dumps(token)[1:-1] not in words:
                made.append(token)
            continue
        scale = float(f"1{number[3]}") if (number[3] or "").startswith("e") else 1.0
        value = float(token.rstrip("M").replace(",", ""))
        close = 0.5 * scale * 10.0 ** -max(len(number[2] or ".") - 1, 0) * (1 + 1e-6)
        factors = UNITS.get(unit, (1e-6,) if number[3] == "M" else (1, 1000) if number[2] is None else (1,))
        if token not in WORDS and not any(abs(f * n - value) <= close for f in factors for n in numbers):
            made.append(f"{token} {unit or ''}".strip())
    return made


@pytest.fixture
def known(measured: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    recipe, results = card.facts(measured)
    return copy.deepcopy(recipe), copy.deepcopy(results)


def test_every_number_is_in_the_two_files(known: tuple[dict[str, Any], dict[str, Any]]) -> None:
    recipe, results = known
    text = card.render(recipe, results)
    assert untraceable(text, recipe, results) == []
    assert (
        untraceable(text.replace("64 every 64", "64 every 65"), recipe, results) == ["65"] or "64 every 64" not in text
    )
    kl = f"{results['quality']['metrics']['kl']['value']:.4g}"
    wrong = f"{float(kl) * 1.01:.4g}"
    assert kl in text and untraceable(text.replace(kl, wrong), recipe, results)
    assert untraceable(f"{text}\nIt is 3.7 times faster, on an H999.", recipe, results) == ["3.7", "H999"]


@pytest.mark.parametrize("folder", CARDS, ids=lambda path: path.name)
def test_committed_cards(folder: Path) -> None:
    """What lies in model_cards is what its facts give, number for number, and the Hub would take it."""
    facts = json.loads((folder / "facts.json").read_text())
    drawn = [path.name for path in (folder / "assets").glob("*.png")]
    text = (folder / "README.md").read_text()
    assert text == card.render(facts["recipe"], facts["results"], drawn)
    assert untraceable(text, facts["recipe"], facts["results"]) == []
    assert card.metadata_problems(metadata(text)) == []
    assert (
        drawn or not facts["results"]["layers"]
    )  # scales that were trained end to end have no errors of single layers


def test_there_are_three_committed_cards() -> None:
    if not (REPO / "model_cards").is_dir():
        pytest.skip("no cards beside the tests")
    schemes = [set(json.loads((path / "facts.json").read_text())["recipe"]["schemes"].values()) for path in CARDS]
    assert {"W8A16-g128"} in schemes and {"W4A16-g128"} in schemes and any(len(each) > 1 for each in schemes)


def test_the_template_has_no_numbers_of_its_own() -> None:
    source = (Path(hf_quant.publish.__file__).parent / "templates" / "card.md.jinja").read_text()
    literal = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", source)
    assert set(re.findall(r"[\w-]*\d[\w-]*", literal)) <= WORDS | {"sha256"}


def test_other_facts_give_other_numbers(known: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """With every number replaced by another, nothing of the old card is left in the new one."""
    draw = random.Random(0)

    def other(record: Any) -> Any:
        if isinstance(record, dict):
            return {key: other(value) for key, value in record.items()}
        if isinstance(record, list):
            return [other(value) for value in record]
        if isinstance(record, bool) or not isinstance(record, (int, float)):
            return record
        return type(record)(10 ** draw.uniform(0, 9) + 10) if isinstance(record, int) else 10 ** draw.uniform(-4, 2)

    recipe, results = known
    results |= {"tasks": {"arc": {"acc": 0.5}}, "bench": bench()}
    new = other(recipe), other(results)
    text = card.render(*new)
    assert untraceable(text, *new) == []
    assert len(untraceable(text, recipe, results)) > 30


def bench() -> dict[str, Any]:
    speed = {
        "batch": 1, "prompt": 128, "new": 32, "prefill": 1600.5, "decode": 80.25, "first_token": 0.0785,
        "prefill_spread": 0.02, "decode_spread": 0.05,
    }  # fmt: skip
    each = {"load_seconds": 1.5, "weight_bytes": 10**7, "peak_bytes": 2 * 10**7, "where": "process", "speed": [speed]}
    machine = {"cpu": "Some CPU", "gpus": [], "threads": 3, "torch": "2.13.0"}
    return {
        "base": each,
        "model": each,
        "slower": ["decode at batch 1: slower than the base here"],
        "machine": machine,
    }


def test_a_ladder_of_a_few_documents_has_no_intervals(known: tuple[dict[str, Any], dict[str, Any]]) -> None:
    recipe, results = known
    quality = copy.deepcopy(results["quality"])
    quality["metrics"]["kl"] |= {"low": None, "high": None}
    rung = {
        "name": "W4A16-g32", "bytes": 1000, "bits_per_weight": 4.5, "misses": [], "quality": quality, "speed": {"batch": 1, "decode": 9.0}
    }  # fmt: skip
    ladder = {
        "rungs": [rung],
        "chosen": "W4A16-g32",
        "chosen_bytes": 1000,
        "limits": {"max_kl": 9.0},
        "held_back": None,
    }
    line = f"| {card.number(quality['metrics']['kl']['value'])} | - |"
    assert line in card.render(recipe, results | {"ladder": ladder})


def test_what_a_card_says_of_dtypes_heads_and_caches(known: tuple[dict[str, Any], dict[str, Any]]) -> None:
    recipe, results = known
    quality = results["quality"] | {"dtype": "float32"}
    assert "| the base itself, in bfloat16 |" in card.render(recipe, results | {"quality": quality})
    speeds = bench() | {"kv_cache": "int4"}
    assert "key-value cache was in int4" in card.render(recipe, results | {"bench": speeds})
    assert "key-value cache" not in card.render(recipe, results | {"bench": bench() | {"kv_cache": "float"}})
    cosine = results["quality"]["metrics"]["kl"]
    for name, loaded in (("logits_cosine", "hf_quant.load("), ("embedding_cosine", "AutoModel.from_pretrained(")):
        text = card.render(recipe, {"quality": quality | {"kind": "encoder", "metrics": {name: cosine}}})
        assert loaded in text and "passage by passage" in text and "in windows of" not in text


def test_what_was_not_measured_is_said(known: tuple[dict[str, Any], dict[str, Any]]) -> None:
    recipe, _ = known
    text = card.render(recipe, {})
    assert text.count("not measured") >= 6 and "Not measured." in text and "KL" not in text
    assert "hf_quant.load(" in text and metadata(text).keys() == {
        "license",
        "language",
        "library_name",
        "pipeline_tag",
    }
    full = card.render(*known)
    assert "Benchmark tasks: not measured" in full and "Quality budget: `max_kl` 9: kept" in full


def test_a_strangers_text_stays_text(known: tuple[dict[str, Any], dict[str, Any]]) -> None:
    recipe, results = known
    evil = '<script>alert(1)</script> ](javascript:x) | `a` \n---\nlicense: mit\n# head <img src=x onerror="y">'
    recipe["source"] |= {"model": f"o/{evil}", "license": "other", "license_name": evil, "license_link": evil}
    recipe["left"] = {evil: evil}
    recipe["versions"] = {evil: evil}
    results["layers"][0]["layer"] = evil
    text = card.render(recipe, results)
    data, body = metadata(text), card.SEAL.sub("", text).split("---\n", 2)[2]
    assert data["license"] == "other" and data["license_name"] == evil and data["base_model"] == f"o/{evil}"
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    flat = [child for token in tokens for child in [token, *(token.children or [])]]
    html = {token.content.strip() for token in flat if token.type.startswith("html")}
    assert all(
        re.fullmatch(r"</?(details|summary|sub)>.*", each, re.DOTALL) and "script" not in each for each in html
    ), html
    links = [token.attrGet("href") for token in flat if token.type == "link_open"]
    assert all(str(link).startswith("https://") and "javascript:" not in str(link) for link in links), links
    assert [t.content for t in flat if t.type == "image"] == []
    heads = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert not any(head.startswith("head") for head in heads)


def test_metadata(hub: FakeHub, known: tuple[dict[str, Any], dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The client and the Hub take it, and so does the check that needs neither."""
    recipe, results = known
    recipe["source"] |= {
        "model": "Org/Tiny",
        "revision": "0" * 40,
        "extra_gated_prompt": "Be nice: 100 %",
        "gated": "manual",
    }
    text = card.render(recipe | {"gated": "manual"}, results)
    if VALIDATES:
        ModelCard(text).validate()
        assert hub.calls("POST", "validate-yaml")[0]["status"] == 200
    data = metadata(text)
    assert data["base_model"] == "Org/Tiny" and data["base_model_relation"] == "quantized"
    assert data["extra_gated_prompt"] == "Be nice: 100 %" and "tags" not in data
    assert "extra_gated_prompt" not in metadata(card.render(recipe | {"gated": False}, results))
    assert card.metadata_problems(data) == []
    values = {m["type"]: m["value"] for m in data["model-index"][0]["results"][0]["metrics"]}
    assert values["kl_divergence"] == results["quality"]["metrics"]["kl"]["value"] and "base_perplexity" not in values
    index = ModelCard(text).data.eval_results
    assert index is not None and len(index) == 4
    for bad, words in (
        ({"license": "mine"}, "does not know"), ({"license": "other"}, "license_name"), ({}, "empty"),
        ({"license": "mit", "base_model": "a/b"}, "go together"), ({"license": "mit", "tags": [1]}, "tags"),
        ({"license": "mit", "model-index": [{"results": [{"metrics": [{"value": "x"}]}]}]}, "no number"),
    ):  # fmt: skip
        assert words in "; ".join(card.metadata_problems(bad))


def test_endings_of_a_chat(known: tuple[dict[str, Any], dict[str, Any]], folder: Path) -> None:
    """Rows that only some texts have, with the number of tokens; what they say of the base is not said of the model."""
    recipe, results = known
    one = {"value": 0.25, "low": None, "high": None, "noise": 0.75, "within_noise": None, "positions": 1234}
    results["quality"]["metrics"] |= dict.fromkeys(
        ("end_of_thought", "end_of_thought_base", "end_of_thought_early"), one
    )
    text = card.render(recipe, results)
    assert "| ends a thought where the text does (1,234 tokens) | 25.0 % | - | 75.0 % |" in text
    assert "| the base ends a thought there (1,234 tokens) | 25.0 % | - | - |" in text
    types = {m["type"] for m in metadata(text)["model-index"][0]["results"][0]["metrics"]}
    assert {"end_of_thought", "end_of_thought_early"} < types and "end_of_thought_base" not in types
    (folder / "results.json").write_text(json.dumps(results))
    assert "ends a thought where the text does (1,234 tokens)" in html_page(folder, None, [])


def test_what_was_done_step_by_step(known: tuple[dict[str, Any], dict[str, Any]]) -> None:
    recipe, results = known
    assert "| method | rounding to the grid with the least squared error, without data |" in card.render(
        recipe, results
    )
    recipe["steps"] = {"8 bits": [{"name": "rtn"}], "4 bits": [{"name": "awq"}, {"name": "mine|<b>"}]}
    recipe["calibration"] = {"name": "calibration.txt", "sequences": 7, "context": 64, "sha256": "0" * 64}
    text = card.render(recipe, results)
    assert "| 8 bits: rounding to the grid with the least squared error; 4 bits: [AWQ](" in text
    assert "then `mine/<b>` |" in text and "7 sequences of 64 tokens" in text
    assert "--calibration-tokens 448" in text and "--calibration " not in text, "that name is found by itself"
    assert untraceable(text, recipe, results) == []


def test_what_differs_from_the_base(known: tuple[dict[str, Any], dict[str, Any]]) -> None:
    recipe, results = copy.deepcopy(known)
    trained: dict[str, Any] = {
        "settings": {"steps": 9, "batch": 2, "seed": 0, "everything": True}, "tokens": 9, "loss": "KL", "teacher": None, "start": "gptq",
        "text": {"name": "t.txt", "sha256": "0" * 64, "context": 8}, "learning_rates": [[0, 1e-4]],
        "kept": {"step": 5, "before": 2.0, "after": 1.0},
    }  # fmt: skip

    def notice(**changed: Any) -> str:
        text = card.render(recipe | changed, results)
        return next(line for line in text.splitlines() if line.startswith("Modification notice"))

    scaled = {"4 bits": [{"name": "awq"}, {"name": "gptq"}]}
    assert notice(steps=scaled).endswith("were rescaled to match; everything else is the base's.")
    assert notice().endswith("were changed by quantizing them; everything else is the base's.")
    assert notice(training=trained).endswith("were changed by training and quantizing them; all others were trained.")
    untouched = trained | {"kept": trained["kept"] | {"step": 0}}
    assert notice(training=untouched).endswith("; everything else is the base's.")
    assert notice(training=untouched | {"checkpoint": "other"}).endswith("; all others are those of other.")
    text = card.render(recipe | {"training": trained, "calibration": None, "regrouped": {"lm_head": "so"}}, results)
    assert "`gptq`, whose codes the training began from, looked at its first windows." in text
    left, regrouped = text.split("## What was quantized in another way")
    assert "`lm_head`: so" in regrouped.split("## ")[0] and "`lm_head`: so" not in left


@pytest.mark.parametrize(
    ("slugs", "said"),
    [
        (["W4A16-g128", "W8A16-g128"], "pack-quantized"),
        (["W8A8"], "int-quantized"),
        (["W8A8", "W4A16-g128"], "mixed-precision"),
    ],
)
def test_the_format_is_that_of_the_config(
    known: tuple[dict[str, Any], dict[str, Any]], slugs: list[str], said: str
) -> None:
    recipe, results = known
    named = {f"model.layers.{i}.mlp.up_proj": slug for i, slug in enumerate(slugs)}
    text = card.render(recipe | {"format": "compressed_tensors", "scheme": slugs[0], "schemes": named}, results)
    assert f"| format | compressed-tensors, `{said}` |" in text
    default, *others = map(QuantScheme.parse, slugs)
    assert config_of(default, {str(i): scheme for i, scheme in enumerate(others)}, [])["format"] == said


def test_build_show_validate(folder: Path) -> None:
    assert "card build writes it" in run("card", "validate", folder, code=1).stderr
    run("card", "build", folder)
    assert (folder / "assets" / "layers.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "README.md").read_text()
    assert run("card", "show", folder).stdout.strip() == text.strip()
    assert json.loads(run("card", "validate", folder, "--json").stdout)["problems"] == []
    (folder / "README.md").write_text(
        text.replace("MB in place of", "kB in place of").replace("kB in place", "B in place")
    )
    assert "is not what recipe.json and results.json give" in run("card", "validate", folder, code=1).stderr
    (folder / "README.md").write_text(text)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config + "\n")
    assert "results.json was not measured on these weights" in run("card", "validate", folder, code=1).stderr
    (folder / "config.json").write_text(config)
    (folder / "recipe.json").write_text("[]")
    assert "recipe.json: not an object" in run("card", "show", folder, code=1).stderr
    (folder / "recipe.json").unlink()
    assert "no recipe.json" in run("card", "build", folder, code=1).stderr


def test_a_card_written_by_hand_stays(hub: FakeHub, folder: Path) -> None:
    (folder / "README.md").write_text("# mine\n")
    for command in (["card", "build", folder], ["push", folder, "alice/tiny", "--yes"]):
        assert "README.md was not written by hf-quant: move it away" in run(*command, code=1).stderr
    assert (folder / "README.md").read_text() == "# mine\n" and not hub.repos
    run("card", "build", folder, "--overwrite")
    run("card", "build", folder)
    written = (folder / "README.md").read_text()
    for changed in (written.replace("## Limits", "## My notes\n\nmine\n\n## Limits"), f"{written}\nmine\n"):
        (folder / "README.md").write_text(changed)
        for command in (["card", "build", folder], ["push", folder, "alice/tiny", "--yes"]):
            assert "README.md was changed by hand after hf-quant wrote it" in run(*command, code=1).stderr
        assert (folder / "README.md").read_text() == changed and not hub.repos
    for unchanged in (
        written.replace("\n", "\r\n"),
        card.SEAL.sub("\n", written),
    ):  # the first versions wrote no digest
        (folder / "README.md").write_text(unchanged, newline="")
        run("card", "build", folder)
    assert (folder / "README.md").read_text() == written


@pytest.mark.parametrize(
    "evil",
    ["x`;touch INJ;`y", "$(touch INJ)", "a'b\\'; touch INJ; '", "a\nb\x1b[31m\u202e'$(touch INJ)", "é b --override"],
)
def test_the_command_is_pasted_safely(evil: str, known: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path) -> None:
    """Every word arrives as it was, on one line, and runs nothing."""
    recipe, results = known
    recipe["source"]["model"] = evil
    recipe["calibration"] = {"name": evil, "sequences": 1, "context": 1, "sha256": "0"}
    recipe["asked"] = {"overrides": {evil: "W8A16-g128"}, "modules_to_not_convert": [evil]}
    text = card.render(recipe, results)
    assert not re.search("[\x1b\u202e]", text)
    command = re.search(r"```bash\n(.*?)\n```", text, re.DOTALL)
    assert command is not None
    said = subprocess.run(
        ["bash", "-c", command[1].replace("hf-quant", "printf '%s\\0'", 1)], cwd=tmp_path, capture_output=True, check=True
    ).stdout.decode()  # fmt: skip
    words = said.split("\0")
    assert [words[1], words[words.index("--calibration") + 1], words[words.index("--ignore") + 1]] == [evil] * 3
    assert f"{evil}=W8A16-g128" in words and not (tmp_path / "INJ").exists()


def put(record: Any, path: str, value: Any) -> None:
    *above, last = path.split(".")
    for key in above:
        record = record[key]
    record[last] = value


@pytest.mark.parametrize(
    ("kind", "path", "value", "words"),
    [
        ("recipe", "scheme", 4, "scheme: 4 is not of type 'string'"),
        ("recipe", "scheme", "W5A16", "recipe.json: scheme: not a scheme"),
        ("recipe", "schemes", ["a"], "schemes: "),
        ("recipe", "source.model", None, "source.model: None is not of type 'string'"),
        ("recipe", "asked", {"overrides": {"a": 1}}, "asked.overrides.a: 1 is not of type"),
        ("recipe", "calibration", {"name": "x"}, "calibration: 'sequences' is a required property"),
        ("recipe", "left.x", "\ud800", "surrogates not allowed"),
        ("results", "quality", [1], "quality: "),
        ("results", "quality.tokens", 0, "quality.tokens: 0 is less than the minimum of 1"),
        ("results", "quality.metrics.kl.value", "0", "quality.metrics.kl.value: '0' is not of type 'number'"),
        ("results", "quality.metrics.kl.value", float("nan"), "NaN is no number"),
        ("results", "gate", {"budget": {"x": 1}, "passed": True, "misses": []}, "gate.budget: "),
        ("results", "quality.metrics.kl.value", -5.0, "quality.metrics.kl.value: -5.0 is less than the minimum"),
        ("results", "quality.metrics.top1.value", 1.5, "quality.metrics.top1.value: 1.5 is greater than the maximum"),
        ("results", "gate", [1], "gate: "),
        ("results", "bytes", 10**30, "is too large"),
        ("results", "base_bytes", 0, "base_bytes: 0 is less than the minimum of 1"),
        ("results", "layers", [{"layer": "x" * 10**5}], "results.json: layers.0: "),
        ("results", "ladder", {"rungs": []}, "ladder"),
        ("ladder", "rungs.0.speed", {}, "rungs.0.speed: "),
        ("ladder", "sensitivity", {"bits": [4], "kl": {"a": []}}, "sensitivity.kl.a: not one number for each of the bits"),
    ],
)  # fmt: skip
def test_facts_that_people_edited(kind: str, path: str, value: Any, words: str, folder: Path) -> None:
    """The field is named, in one short line, by whatever reads the file."""
    if kind == "ladder":
        facts = json.loads((REPO / "model_cards" / "ref-llama-16m-mixed" / "facts.json").read_text())
        (folder / "ladder.json").write_text(json.dumps(facts["results"]["ladder"]))
    record = json.loads((folder / f"{kind}.json").read_text())
    if path.startswith("rungs.0"):
        record["rungs"][0]["speed"] = value
    else:
        put(record, path, value)
    (folder / f"{kind}.json").write_text(json.dumps(record))
    for command in (["report", folder], *([] if kind == "ladder" else [["card", "show", folder]])):
        error = run(*command, code=1).stderr
        assert f"{kind}.json: " in error and words in error and len(error) < 600


def test_a_failed_gate_is_the_first_sentence(known: tuple[dict[str, Any], dict[str, Any]]) -> None:
    recipe, results = known
    gate = {"budget": {"max_kl": 0.01}, "passed": False, "misses": ["KL 3 is over the 0.01 allowed, by 2.99"]}
    body = card.render(recipe, results | {"gate": gate, "allow_failed_gate": True}).split("---\n", 2)[2]
    first = next(line for line in body.splitlines() if line and not line.startswith("#"))
    assert first.startswith("**This model missed its quality gate and was published all the same: KL 3 is over")
    assert "inside the budget" not in body and "`max_kl` 0.01: **missed**" in body
    assert "The quality of this model was not measured" in card.render(recipe, {"allow_failed_gate": True})
    passed = card.render(recipe, results | {"gate": gate | {"passed": True, "misses": []}, "allow_failed_gate": True})
    assert "published all the same" not in passed


def test_the_command_makes_the_same_weights(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the card says under "Reproduce it", typed in beside the base."""
    options = ["--scheme", "W4A16-g32-asym", "--override", "*.down_proj=W8A16-g32", "--override", "*.1.*.q_proj=float"]
    run(
        "quantize",
        base,
        "-o",
        tmp_path / "a",
        *options,
        "--ignore",
        "*.0.*.k_proj",
        "--lm-head",
        "--format",
        "native",
        "-q",
    )
    text = run("card", "show", tmp_path / "a").stdout
    command = re.search(r"```bash\n(hf-quant .*?)\n```", text, re.DOTALL)
    assert command is not None
    monkeypatch.chdir(base.parent)
    import shlex

    words = shlex.split(command[1].replace("\\\n", " "))
    assert words[:3] == ["hf-quant", "quantize", "tiny"] and words[4] == "OUT"
    run(*words[1:4], tmp_path / "b", *words[5:], "-q")
    assert measured_files(tmp_path / "a") == measured_files(tmp_path / "b")


def test_what_a_base_hands_on(hub: FakeHub, base: Path, tmp_path: Path) -> None:
    assert describe(str(base)) == {
        "model": "tiny", "revision": None, "license": "apache-2.0", "language": "en", "pipeline_tag": "text-generation",
    }  # fmt: skip
    (tmp_path / "plain").mkdir()
    assert describe(str(tmp_path / "plain")) == {"model": "plain", "revision": None}
    hub.create_repo("Org/Base").gated = "auto"
    head = {
        "license": "gemma",
        "extra_gated_heading": "Ask",
        "widget": [{"text": "x"}],
        "tags": ["a"],
        "datasets": ["d"],
    }
    hub.put("Org/Base", {"README.md": f"---\n{yaml.safe_dump(head)}---\n".encode()})
    found = describe("Org/Base")
    assert found == {
        "model": "Org/Base", "revision": hub.repo("Org/Base").refs["main"], "license": "gemma", "gated": "auto",
        "extra_gated_heading": "Ask",
    }  # fmt: skip
    with pytest.raises(PushError, match="the base Org/Other is not on the Hub"):
        describe("Org/Other")
    hub.fault("api/models/Org/Base", action="reset", times=99)
    with pytest.raises(PushError, match="the base Org/Base cannot be read now: ReadError"):
        describe("Org/Base")


@pytest.mark.parametrize(
    ("source", "repo_id", "words"),
    [
        ({"license": "apache-2.0"}, "a/b", None),
        ({}, "a/b", "is not known"),
        ({"license": "unknown"}, "a/b", "is not known"),
        ({"license": "mine"}, "a/b", "knows no licence"),
        ({"license": "cc-by-nc-nd-4.0"}, "a/b", "forbids derivatives"),
        ({"license": "cc-by-nd-4.0"}, "a/b", "forbids derivatives"),
        ({"license": "cc-by-nc-4.0"}, "a/b", None),
        ({"license": "other"}, "a/b", "without a license_name"),
        ({"license": "other", "license_name": "some-noderivatives-licence"}, "a/b", "forbids derivatives"),
        ({"license": "other", "license_name": "my-licence"}, "a/b", None),
        ({"license": "llama3.1"}, "a/small", "begin with Llama"),
        ({"license": "llama3.1"}, "a/Llama-3.1-small", None),
        ({"license": "other", "license_name": "llama4"}, "a/small", "begin with Llama"),
        ({"license": "llama2"}, "a/small", None),
    ],
)
def test_licences(source: dict[str, str], repo_id: str, words: str | None) -> None:
    refusal = licence.why_not(source, repo_id)
    assert refusal is None if words is None else words in str(refusal)


def test_notices() -> None:
    assert (
        licence.attribution({"license": "llama3.3"}) == "Built with Llama"
        and licence.attribution({"license": "llama2"}) is None
    )
    assert "Llama 3.3 Community License" in str(licence.notice({"license": "llama3.3"}))
    assert (
        "Gemma Terms of Use" in str(licence.notice({"license": "gemma"}))
        and licence.notice({"license": "mit"}) is None
    )


def test_every_missing_field_of_a_record_is_a_sentence(folder: Path) -> None:
    """Each field of both records left out, one after the other: a card, or an error that says what is missing."""
    kept = {kind: json.loads((folder / f"{kind}.json").read_text()) for kind in ("recipe", "results")}
    refused = 0
    for kind, record in kept.items():
        for field in record:
            changed = kept | {kind: {name: value for name, value in record.items() if name != field}}
            try:
                check_facts(changed[kind], kind)
                card.render(changed["recipe"], changed["results"])
            except HfQuantError as error:
                refused += 1
                assert ".json" in str(error)
    assert refused > 5
