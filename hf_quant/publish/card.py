"""A model card whose numbers are all measured: it is rendered from recipe.json and results.json alone.

``huggingface_hub.ModelCardData`` and ``EvalResult`` are not used: a published card is compared byte for
byte with what its facts give, and these classes put the fields into an order of their own.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError

from hf_quant.disk.digests import CONFIG, measured_files, same_files
from hf_quant.errors import CheckpointError, PushError
from hf_quant.evaluation.results import amount_of, interval_shown
from hf_quant.publish import charts, licence, sentences
from hf_quant.publish.facts import read_facts
from hf_quant.publish.markdown import code, line, md, number, percent, plain, size
from hf_quant.publish.sentences import MISSING, OF_BASE, TITLES
from hf_quant.publish.source import HEAD, metadata

CARD, ASSETS = "README.md", "assets"
MARK = "<sub>Written by hf-quant from `recipe.json` and `results.json`"  # the last line of the template
SEAL = re.compile(r"\n<!-- sha256 of the text above: ([0-9a-f]{64}) -->\s*")  # by which changes by hand are noticed
SHOWN = 12  # layers with the largest errors
TASKS = {  # of the Hub, by `Quality.kind`
    "causal": {"type": "text-generation", "name": "Text generation"},
    "seq2seq": {"type": "text2text-generation", "name": "Text2text generation"},
    "encoder": {"type": "feature-extraction"},
}


# -- facts ------------------------------------------------------------------------------------------------------------


def facts(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """recipe.json and results.json of a folder; the second one may be missing.

    Raises:
        PushError: There is no recipe, or one of them is damaged; names the field.
    """
    try:
        recipe, results = read_facts(folder, "recipe"), read_facts(folder, "results")
    except CheckpointError as error:
        raise PushError(str(error)) from None
    if recipe is None:
        raise PushError(f"{folder}: no recipe.json; only what hf-quant quantize or ladder made has a card")
    return recipe, results or {}


def pictures(results: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG images by name, of what was measured; empty without matplotlib."""
    images: dict[str, bytes] = {}
    if charts.available() is None:
        if results.get("ladder"):
            images["ladder.png"] = charts.size_and_kl(results["ladder"], dark=False)
        if results.get("layers"):
            images["layers.png"] = charts.layers(results["layers"], dark=False)
    return images


# -- rendering --------------------------------------------------------------------------------------------------------


def render(recipe: Mapping[str, Any], results: Mapping[str, Any], drawn: Collection[str] = ()) -> str:
    """The text of the card.

    Args:
        recipe: How the model was made.
        results: What was measured.
        drawn: Names of the `pictures` in ``assets``.

    Raises:
        CheckpointError: A field is missing that others require; names it.
    """
    try:
        return _render(recipe, results, drawn)
    except UndefinedError as error:
        raise CheckpointError(f"recipe.json or results.json: {error.message}") from None


def _render(recipe: Mapping[str, Any], results: Mapping[str, Any], drawn: Collection[str]) -> str:
    environment = Environment(
        loader=PackageLoader("hf_quant.publish"), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
        autoescape=False,  # Markdown, not HTML: see `md`
    )  # fmt: skip
    environment.filters |= {
        "md": md, "code": code, "plain": plain, "size": size, "percent": percent, "number": number,
        "count": "{:,}".format, "millions": lambda n: f"{n / 1e6:.1f}M",
        "interval": lambda estimate: interval_shown(estimate, number),
    }  # fmt: skip
    quality, source = results.get("quality"), recipe["source"]
    text = environment.get_template("card.md.jinja").render(
        recipe={"calibration": None, "training": None, "dtype": "unknown"} | dict(recipe),
        results={"bench": None, "tasks": None, "gate": None, "files": None} | dict(results),
        yaml=yaml.safe_dump(card_data(recipe, results), sort_keys=False, allow_unicode=True, width=1000),
        title=sentences.title(recipe), warning=sentences.warning(results), verdict=sentences.verdict(recipe, results), missing=MISSING,
        base=sentences.base(source), schemes=dict(Counter(recipe["schemes"].values()).most_common()),
        method=sentences.method(recipe), format=sentences.format(recipe),
        loading=sentences.loading(recipe, results), elsewhere=sentences.elsewhere(recipe), quality=quality,
        quality_rows=sentences.quality_rows(quality) if quality else [], amount=amount_of(quality) if quality else "", ladder=results.get("ladder"), charts=drawn,
        layers=(results.get("layers") or [])[:SHOWN], left=sentences.by_reason(recipe["left"]),
        regrouped=sentences.by_reason(recipe.get("regrouped") or {}), command=sentences.command(recipe),
        limits=sentences.limits(recipe, results), licence=sentences.licence(source), attribution=licence.attribution(source),
        notice=licence.notice(source), modification=sentences.modification(recipe), repo_id=recipe.get("repo_id"),
    )  # fmt: skip
    return _sealed(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")


def _sealed(text: str) -> str:
    return f"{text}\n<!-- sha256 of the text above: {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().replace("\r\n", "\n").encode()).hexdigest()


def card_data(recipe: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata, without what the Hub derives itself, such as tags."""
    source = recipe["source"]
    data: dict[str, Any] = {
        key: source[key] for key in ("license", "license_name", "license_link", "language") if key in source
    }
    data |= {"library_name": "transformers"}
    data |= {"pipeline_tag": source["pipeline_tag"]} if "pipeline_tag" in source else {}
    if "/" in str(source.get("model")):
        data |= {"base_model": source["model"], "base_model_relation": "quantized"}
    if recipe.get("gated", source.get("gated")):
        data |= {key: value for key, value in source.items() if key.startswith("extra_gated_")}
    if results.get("quality"):
        data["model-index"] = _model_index(recipe, results["quality"])
    return data


def _model_index(recipe: Mapping[str, Any], quality: Mapping[str, Any]) -> list[dict[str, Any]]:
    metrics = [
        {
            "type": "kl_divergence" if name == "kl" else name, "value": metric["value"],
            "name": TITLES.get(name, (name,))[0]
            + ("" if metric["low"] is None else f" (95 % interval {interval_shown(metric, '{:.5g}'.format)})"),
        }
        for name, metric in quality["metrics"].items() if name not in OF_BASE
    ]  # fmt: skip
    digest, inputs = quality["text_sha256"][:12], quality.get("inputs")
    task = task_of(quality["kind"], inputs, "top1" in quality["metrics"]) if inputs else TASKS[quality["kind"]]
    dataset = {"type": "text", "name": f"held-out text, sha256 of the token ids {digest}"}
    if inputs:
        dataset = {"type": "inputs", "name": f"held-out {' and '.join(inputs)}, sha256 {digest}"}
    return [
        {"name": line(sentences.title(recipe)), "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}
    ]


def task_of(kind: str, inputs: Collection[str], head: bool) -> dict[str, str]:
    """The task of the Hub of a model that was measured on ``inputs``.

    Args:
        kind: `Quality.kind`.
        inputs: Names of its inputs.
        head: Whether it has classes to choose from.
    """
    sees = any(name.startswith("pixel_values") for name in inputs)
    if not sees and not any(name.startswith(("input_features", "input_values")) for name in inputs):
        return TASKS[kind]
    of_images, of_sounds = {
        "causal": ("image-text-to-text", "audio-text-to-text"),
        "seq2seq": ("image-to-text", "automatic-speech-recognition"),
        "encoder": ("image-classification", "audio-classification") if head else ("feature-extraction",) * 2,
    }[kind]
    return {"type": of_images if sees else of_sounds}


# -- checking ---------------------------------------------------------------------------------------------------------


def check_replaceable(card: bytes | None) -> None:
    """Refuse to replace a card that was written or changed by hand.

    Args:
        card: Content of README.md; None if there is none.

    Raises:
        PushError: It was not written by this package, or not all of it.
    """
    if (reason := by_hand(card)) is not None:
        raise PushError(f"{CARD} {reason}: move it away, or let hf-quant card build --overwrite replace it")


def by_hand(card: bytes | None) -> str | None:
    """What somebody wrote into a card; None if all of it is from this package. Cards of its first versions had no digest."""
    text = (card or b"").decode("utf-8", errors="replace")
    if not HEAD.sub("", text).strip():  # the Hub begins a repository with its licence alone
        return None
    if MARK not in text:
        return "was not written by hf-quant"
    seal = SEAL.search(text)
    if seal is None:
        return None
    changed = text[seal.end() :].strip() or _digest(text[: seal.start()]) != seal[1]
    return "was changed by hand after hf-quant wrote it" if changed else None


def problems(folder: Path) -> list[str]:
    """Problems of the card in ``folder``, found without the Hub; empty if there are none.

    Raises:
        PushError: The folder has no facts to compare it with.
    """
    recipe, results = facts(folder)
    path = folder / CARD
    if not path.is_file():
        return [f"{CARD} is missing; hf-quant card build writes it"]
    text = path.read_text(encoding="utf-8", errors="replace")
    drawn = [image.name for image in (folder / ASSETS).glob("*.png")]
    complaints = (
        [] if text == render(recipe, results, drawn) else [f"{CARD} is not what recipe.json and results.json give"]
    )
    files = measured_files(folder)
    if results and any(file["name"] != CONFIG for file in files) and not same_files(results.get("files"), files):
        complaints.append("results.json was not measured on these weights and this config.json")
    return complaints + metadata_problems(metadata(text))


def metadata_problems(data: Mapping[str, Any]) -> list[str]:
    """Problems that the Hub would have with a card's metadata."""
    complaints = [] if data else ["the metadata is empty or not YAML"]
    if "license" in data and str(data["license"]) not in licence.KNOWN:
        complaints.append(f"license: the Hub does not know {data['license']!r}")
    if data.get("license") == "other" and not data.get("license_name"):
        complaints.append("license: other needs license_name")
    for key in ("language", "tags", "datasets", "base_model"):
        value = data.get(key, [])
        if not all(isinstance(item, str) for item in (value if isinstance(value, list) else [value])):
            complaints.append(f"{key}: must be a string or a list of strings")
    if ("base_model" in data) != ("base_model_relation" in data):
        complaints.append("base_model and base_model_relation go together")
    for model in data.get("model-index", []):
        for result in model.get("results", []):
            for metric in result.get("metrics", []):
                if not isinstance(metric.get("value"), (int, float)) or "type" not in metric:
                    complaints.append(f"model-index: {metric} has no type or no number")
    return complaints
