"""A model card in which every number was measured: written from recipe.json and results.json, and from nothing else."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError

from hf_quant.core.scheme import QuantScheme
from hf_quant.errors import CheckpointError, PushError
from hf_quant.evaluation.results import interval_shown
from hf_quant.formats._compressed_tensors_config import stored_as
from hf_quant.publish import charts, licence
from hf_quant.publish.facts import read_facts
from hf_quant.publish.markdown import code, line, md, number, percent, plain, shell_word, size
from hf_quant.publish.source import metadata

CARD, ASSETS = "README.md", "assets"
MARK = "<sub>Written by hf-quant from `recipe.json` and `results.json`"  # the last line of the template
MISSING = "not measured"
SHOWN = 12  # layers, of those farthest from the base
SMALL = 1_000_000_000  # parameters
STEPS = {
    "rtn": "rounding to the grid with the least squared error",
    "gptq": "[GPTQ](https://arxiv.org/abs/2210.17323)",
    "hqq": "[HQQ](https://mobiusml.github.io/hqq_blog)",
    "awq": "[AWQ](https://arxiv.org/abs/2306.00978)",
    "smoothquant": "[SmoothQuant](https://arxiv.org/abs/2211.10438)",
    "hadamard": "Hadamard rotation of values ([QuaRot](https://arxiv.org/abs/2404.00456))",
    "drift": "targets from the float model ([GPTAQ](https://arxiv.org/abs/2504.02692))",
}
FOUND = ("calibration.txt", "the bundled text (documentation of Python)")  # without being named
TITLES = {
    "kl": ("KL divergence to the base, nats per token", "number"),
    "kl_p50": ("KL divergence, median over tokens", "number"),
    "kl_p99": ("KL divergence, percentile 99 over tokens", "number"),
    "top1": ("same most likely token as the base", "percent"),
    "perplexity": ("perplexity", "perplexity"),
    "base_perplexity": ("perplexity of the base", "perplexity"),
    "perplexity_ratio": ("perplexity over the base's", "ratio"),
    "embedding_cosine": ("cosine of embeddings", "ratio"),
    "logits_cosine": ("cosine of logits", "ratio"),
}


# -- what goes in -----------------------------------------------------------------------------------------------------


def facts(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """recipe.json and results.json of a folder; the second may be missing.

    Raises:
        PushError: There is no recipe, or one of them is damaged; the message names the field.
    """
    try:
        recipe, results = read_facts(folder, "recipe"), read_facts(folder, "results")
    except CheckpointError as error:
        raise PushError(str(error)) from None
    if recipe is None:
        raise PushError(f"{folder}: no recipe.json; only what hf-quant quantize or ladder made has a card")
    return recipe, results or {}


def pictures(results: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG by name, for what was measured; empty without matplotlib."""
    made: dict[str, bytes] = {}
    if charts.available() is None:
        if results.get("ladder"):
            made["ladder.png"] = charts.size_and_kl(results["ladder"], dark=False)
        if results.get("layers"):
            made["layers.png"] = charts.layers(results["layers"], dark=False)
    return made


# -- what comes out ---------------------------------------------------------------------------------------------------


def render(recipe: Mapping[str, Any], results: Mapping[str, Any], drawn: Collection[str] = ()) -> str:
    """The card.

    Args:
        recipe: How the model was made.
        results: What was measured.
        drawn: Names of the `pictures` that lie in ``assets``.

    Raises:
        CheckpointError: A field that the others call for is missing; names it.
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
    }  # fmt: skip
    quality, source = results.get("quality"), recipe["source"]
    text = environment.get_template("card.md.jinja").render(
        recipe={"calibration": None, "dtype": "unknown"} | dict(recipe),
        results={"bench": None, "tasks": None, "gate": None, "files": None} | dict(results),
        yaml=yaml.safe_dump(card_data(recipe, results), sort_keys=False, allow_unicode=True, width=1000),
        title=_title(recipe), warning=_warning(results), verdict=_verdict(recipe, results), missing=MISSING,
        base=_base(source), schemes=dict(Counter(recipe["schemes"].values()).most_common()),
        method=_method(recipe), format=_format(recipe),
        loading=_loading(recipe, results), elsewhere=_elsewhere(recipe), quality=quality,
        quality_rows=_quality_rows(quality) if quality else [], ladder=results.get("ladder"), charts=drawn,
        layers=(results.get("layers") or [])[:SHOWN], left=_by_reason(recipe["left"]),
        regrouped=_by_reason(recipe.get("regrouped") or {}), command=_command(recipe),
        limits=_limits(recipe, results), licence=_licence(source), attribution=licence.attribution(source),
        notice=licence.notice(source), repo_id=recipe.get("repo_id"),
    )  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def card_data(recipe: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata: what the Hub can derive itself, such as tags, is left to it."""
    source = recipe["source"]
    made: dict[str, Any] = {
        key: source[key] for key in ("license", "license_name", "license_link", "language") if key in source
    }
    made |= {"library_name": "transformers"}
    made |= {"pipeline_tag": source["pipeline_tag"]} if "pipeline_tag" in source else {}
    if "/" in str(source.get("model")):
        made |= {"base_model": source["model"], "base_model_relation": "quantized"}
    if recipe.get("gated", source.get("gated")):
        made |= {key: value for key, value in source.items() if key.startswith("extra_gated_")}
    if results.get("quality"):
        made["model-index"] = _model_index(recipe, results["quality"])
    return made


def _model_index(recipe: Mapping[str, Any], quality: Mapping[str, Any]) -> list[dict[str, Any]]:
    causal = quality["kind"] == "causal"
    metrics = [
        {
            "type": "kl_divergence" if name == "kl" else name, "value": each["value"],
            "name": TITLES.get(name, (name,))[0]
            + ("" if each["low"] is None else f" (95 % interval {interval_shown(each, '{:.5g}'.format)})"),
        }
        for name, each in quality["metrics"].items() if name != "base_perplexity"
    ]  # fmt: skip
    task = {"type": "text-generation", "name": "Text generation"} if causal else {"type": "feature-extraction"}
    dataset = {"type": "text", "name": f"held-out text, sha256 of the token ids {quality['text_sha256'][:12]}"}
    return [{"name": line(_title(recipe)), "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]


# -- sentences --------------------------------------------------------------------------------------------------------


def _title(recipe: Mapping[str, Any]) -> str:
    if recipe.get("repo_id"):
        return str(recipe["repo_id"]).rpartition("/")[2]
    schemes = set(recipe["schemes"].values())
    return f"{str(recipe['source']['model']).rpartition('/')[2]}, {next(iter(schemes)) if len(schemes) == 1 else 'mixed bits'}"


def _warning(results: Mapping[str, Any]) -> str | None:
    """What `--allow-failed-gate` has to say first."""
    gate = results.get("gate")
    if not results.get("allow_failed_gate"):
        return None
    if not results.get("quality"):
        return "The quality of this model was not measured, and it was published all the same."
    if not gate:
        return "This model was held against no quality budget, and it was published all the same."
    return f"This model missed its quality gate and was published all the same: {'; '.join(gate['misses'])}."


def _verdict(recipe: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    schemes, base = Counter(recipe["schemes"].values()), _base_link(recipe["source"])
    what = code(next(iter(schemes))) if len(schemes) == 1 else f"a mix of {', '.join(map(code, sorted(schemes)))}"
    made = f"{base} in {what}"
    if "bytes" in results:
        made += f": **{size(results['bytes'])} in place of {size(results['base_bytes'])}**"
    kl, top1 = (((results.get("quality") or {}).get("metrics") or {}).get(name) for name in ("kl", "top1"))
    if kl is None or top1 is None:
        return f"{made}. What that cost: {'see below' if results.get('quality') else MISSING}."
    made += f". It diverges from the base by **{number(kl['value'])} nats per token**"
    made += "" if kl["low"] is None else f" [{interval_shown(kl, number, ', ')}]"
    made += f" and has the same most likely token **{percent(top1['value'])}** of the time"
    within = "which cannot be told from the base's own rounding" if kl["within_noise"] else ""
    kept = "inside the budget it was given" if (results.get("gate") or {}).get("passed") else ""
    rest = [each for each in (within, kept) if each]
    return made + (f", {', '.join(rest)}." if rest else ".")


def _base_link(source: Mapping[str, Any]) -> str:
    name = str(source["model"])
    return f"[{md(name)}](https://huggingface.co/{plain(name)})" if "/" in name else md(name)


def _base(source: Mapping[str, Any]) -> str:
    if "/" not in str(source["model"]):
        return f"{_base_link(source)}, a local folder"
    return _base_link(source) + (f" at {code(source['revision'])}" if source.get("revision") else "")


def _method(recipe: Mapping[str, Any]) -> str:
    """What was done to a weight, one step after the other, and for which bits if not for all."""
    steps = recipe.get("steps") or {"": [{"name": recipe["method"]}]}
    chains: dict[str, list[str]] = {}
    for bits, each in steps.items():
        chains.setdefault(", then ".join(STEPS.get(s["name"], code(s["name"])) for s in each), []).append(bits)
    made = [chain if len(chains) == 1 else f"{', '.join(bits)}: {chain}" for chain, bits in chains.items()]
    return "; ".join(made) + ("" if recipe.get("calibration") else ", without data")


def _format(recipe: Mapping[str, Any]) -> str:
    if recipe["format"] == "compressed_tensors":
        slugs = {recipe["scheme"], *recipe["schemes"].values()}  # its config names the default, used or not
        return f"compressed-tensors, {code(stored_as(map(QuantScheme.parse, slugs)))}"
    return code(recipe["format"]) + (" of hf-quant" if recipe["format"] == "native" else "")


def _loading(recipe: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    where = json.dumps(plain(recipe.get("repo_id") or "path/to/this/folder"))
    kind = (results.get("quality") or {}).get("kind")
    if kind is None:
        return f"import hf_quant\n\nmodel = hf_quant.load({where})"
    auto = "AutoModelForCausalLM" if kind == "causal" else "AutoModel"
    return (
        f"from transformers import {auto}, AutoTokenizer\n\nmodel = {auto}.from_pretrained({where})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({where})"
    )


def _elsewhere(recipe: Mapping[str, Any]) -> str:
    """What reads it without this package; nothing is said to work that was not tried."""
    tried = "vLLM, SGLang and other engines: not checked with this model."
    if recipe["format"] == "native":
        return (
            "Without hf-quant, transformers refuses it with a shape mismatch. `model.dequantize()` gives the "
            f"floating-point model back. {tried}"
        )
    if recipe["format"] != "compressed_tensors":
        return tried
    if any("asym" in slug for slug in recipe["schemes"].values()):
        return (
            "Without hf-quant: `pip install compressed-tensors`, and `from_pretrained(..., quantization_config="
            f"CompressedTensorsConfig(dequantize=True))`. {tried}"
        )
    return f"Without hf-quant: `pip install compressed-tensors`, and the same lines. {tried}"


def _quality_rows(quality: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name in sorted(quality["metrics"], key=lambda n: list(TITLES).index(n) if n in TITLES else len(TITLES)):
        each, (title, kind) = quality["metrics"][name], TITLES.get(name, (name, "number"))
        shown = {"percent": percent, "perplexity": "{:.3f}".format, "ratio": "{:.4f}".format}.get(kind, number)
        noise = "-" if each["noise"] is None or name == "base_perplexity" else shown(each["noise"])
        within = " (within noise)" if each["within_noise"] else ""
        rows.append((md(title), shown(each["value"]) + within, interval_shown(each, shown), noise))
    rows += [(md(TITLES.get(n, (n,))[0]), number(value), "-", "-") for n, value in quality["quantiles"].items()]
    return rows


def _by_reason(named: Mapping[str, str]) -> dict[str, list[str]]:
    made: dict[str, list[str]] = {}
    for name, reason in named.items():
        made.setdefault(reason.partition(";")[0], []).append(name)
    return made


def _command(recipe: Mapping[str, Any]) -> str:
    """What makes the same weights again."""
    source, asked, calibration = recipe["source"], recipe.get("asked") or {}, recipe.get("calibration")
    words = ["hf-quant", "quantize", str(source["model"]), "-o", "OUT", "--scheme", recipe["scheme"]]
    words += ["--method", recipe["method"], "--format", recipe["format"]]
    words += ["--dtype", recipe["dtype"]] if "dtype" in recipe else []
    words += ["--revision", source["revision"]] if source.get("revision") else []
    words += ["--lm-head"] if asked.get("quantize_lm_head") else []
    words += ["--embeddings"] if asked.get("quantize_embeddings") else []
    for name, slug in (asked.get("overrides") or {}).items():
        words += ["--override", f"{name}={slug or 'float'}"] if slug != recipe["scheme"] else []
    for glob in asked.get("modules_to_not_convert") or []:
        words += ["--ignore", glob]
    if calibration:
        words += ["--calibration", calibration["name"]] if calibration["name"] not in FOUND else []
        words += ["--calibration-tokens", str(calibration["sequences"] * calibration["context"])]
    return " ".join(f"\\\n  {each}" if each == "--override" else shell_word(each) for each in words)


def _limits(recipe: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    made, quality = [], results.get("quality")
    if quality:
        made.append(
            f"Measured on {quality['tokens']:,} tokens of one text: other languages and domains, and contexts longer than "
            f"{quality['context']} tokens, were not."
        )
    if not results.get("tasks"):
        made.append("No benchmark tasks were run.")
    if results.get("parameters", SMALL) < SMALL:
        made.append(
            f"With {results['parameters'] / 1e6:.1f}M parameters it is small: small models lose more by quantization."
        )
    made.append("Safety and alignment were not evaluated again; what the base's card says of them may no longer hold.")
    made.append("Intended uses are those of the base, as far as the numbers above allow them.")
    return made


def _licence(source: Mapping[str, Any]) -> str:
    name = source.get("license_name") if source.get("license") == "other" else source.get("license")
    if not name:
        return "The base names no licence."
    link = source.get("license_link")
    target = f" ({md(str(link))})" if link else ""
    return f"Under the licence of the base, {_base_link(source)}: {code(name)}{target}."


# -- checking ---------------------------------------------------------------------------------------------------------


def check_replaceable(card: bytes | None) -> None:
    """Refuse to replace a card that somebody wrote by hand.

    Args:
        card: What README.md holds; None if there is none.

    Raises:
        PushError: It was not written by this package.
    """
    if card is not None and MARK.encode() not in card:
        raise PushError(
            f"{CARD} was not written by hf-quant: move it away, or let hf-quant card build --overwrite replace it"
        )


def problems(folder: Path) -> list[str]:
    """What is wrong with the card in ``folder``, checked without the Hub; empty if nothing is.

    Raises:
        PushError: There are no facts to hold it against.
    """
    recipe, results = facts(folder)
    path = folder / CARD
    if not path.is_file():
        return [f"{CARD} is missing; hf-quant card build writes it"]
    text = path.read_text(encoding="utf-8", errors="replace")
    drawn = [each.name for each in (folder / ASSETS).glob("*.png")]
    made = [] if text == render(recipe, results, drawn) else [f"{CARD} is not what recipe.json and results.json give"]
    return made + metadata_problems(metadata(text))


def metadata_problems(data: Mapping[str, Any]) -> list[str]:
    """What the Hub would not take, or would not understand, in a card's metadata."""
    made = [] if data else ["the metadata is empty or not YAML"]
    if "license" in data and str(data["license"]) not in licence.KNOWN:
        made.append(f"license: the Hub does not know {data['license']!r}")
    if data.get("license") == "other" and not data.get("license_name"):
        made.append("license: other needs license_name")
    for key in ("language", "tags", "datasets", "base_model"):
        value = data.get(key, [])
        if not all(isinstance(each, str) for each in (value if isinstance(value, list) else [value])):
            made.append(f"{key}: must be a string or a list of strings")
    if ("base_model" in data) != ("base_model_relation" in data):
        made.append("base_model and base_model_relation go together")
    for model in data.get("model-index", []):
        for result in model.get("results", []):
            for metric in result.get("metrics", []):
                if not isinstance(metric.get("value"), (int, float)) or "type" not in metric:
                    made.append(f"model-index: {metric} has no type or no number")
    return made
