"""The sentences and table rows of a model card, from recipe.json and results.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hf_quant.core.scheme import QuantScheme
from hf_quant.evaluation.results import amount_of, interval_shown
from hf_quant.formats import formats
from hf_quant.publish.markdown import code, md, number, percent, plain, shell_word, size

MISSING = "not measured"
SMALL = 1_000_000_000  # parameters
RESCALING = {"awq", "smoothquant"}  # steps that change weights which are not quantized, too
STEPS = {
    "rtn": "rounding to the grid with the least squared error",
    "gptq": "[GPTQ](https://arxiv.org/abs/2210.17323)",
    "hqq": "[HQQ](https://mobiusml.github.io/hqq_blog)",
    "awq": "[AWQ](https://arxiv.org/abs/2306.00978)",
    "smoothquant": "[SmoothQuant](https://arxiv.org/abs/2211.10438)",
    "hadamard": "Hadamard rotation of values ([QuaRot](https://arxiv.org/abs/2404.00456))",
    "drift": "targets from the float model ([GPTAQ](https://arxiv.org/abs/2504.02692))",
}
UNNAMED_TEXTS = ("calibration.txt", "the bundled text (documentation of Python)")  # used without an option
TITLES = {
    "kl": ("KL divergence to the base, nats per token", "number"),
    "kl_p50": ("KL divergence, median over tokens", "number"),
    "kl_p99": ("KL divergence, percentile 99 over tokens", "number"),
    "top1": ("same most likely token as the base", "percent"),
    "perplexity": ("perplexity", "perplexity"),
    "base_perplexity": ("perplexity of the base", "perplexity"),
    "perplexity_ratio": ("perplexity over the base's", "ratio"),
    "stop": ("ends an answer or a document where the text does", "percent"),
    "stop_base": ("the base ends an answer or a document there", "percent"),
    "stop_change": ("ends an answer or a document there, minus the base", "number"),
    "stop_early": ("ends an answer or a document where the text goes on", "number"),
    "stop_early_base": ("the base ends an answer or a document where the text goes on", "number"),
    "end_of_thought": ("ends a thought where the text does", "percent"),
    "end_of_thought_base": ("the base ends a thought there", "percent"),
    "end_of_thought_change": ("ends a thought there, minus the base", "number"),
    "end_of_thought_early": ("ends a thought where the text goes on", "number"),
    "end_of_thought_early_base": ("the base ends a thought where the text goes on", "number"),
    "embedding_cosine": ("cosine of embeddings", "ratio"),
    "logits_cosine": ("cosine of logits", "ratio"),
}
OF_BASE = (
    "base_perplexity",
    *(name for name in TITLES if name.endswith("_base")),
)  # what they say is not about the model

AUTO = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "encoder": "AutoModel",
}  # by `Quality.kind`


def title(recipe: Mapping[str, Any]) -> str:
    """Title of the card: the repository, or the base and its quantization."""
    if recipe.get("repo_id"):
        return str(recipe["repo_id"]).rpartition("/")[2]
    schemes = _kinds(recipe)
    return f"{str(recipe['source']['model']).rpartition('/')[2]}, {next(iter(schemes)) if len(schemes) == 1 else 'mixed bits'}"


def _kinds(recipe: Mapping[str, Any]) -> set[str]:
    """The schemes of the layers, without the padding that widths need."""
    return {str(QuantScheme.parse(slug).stored) for slug in recipe["schemes"].values()}


def warning(results: Mapping[str, Any]) -> str | None:
    """The first lines of a card published with `--allow-failed-gate`."""
    gate = results.get("gate")
    if not results.get("allow_failed_gate") or (gate or {}).get("passed"):
        return None
    if not results.get("quality"):
        return "The quality of this model was not measured, and it was published all the same."
    if not gate:
        return "This model was held against no quality budget, and it was published all the same."
    return f"This model missed its quality gate and was published all the same: {'; '.join(gate['misses'])}."


def verdict(recipe: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """How small the model is, what that costs in quality, and how fast it is, for readers who know none of the measures."""
    schemes, base = _kinds(recipe), _base_link(recipe["source"])
    what = code(next(iter(schemes))) if len(schemes) == 1 else f"a mix of {', '.join(map(code, sorted(schemes)))}"
    text = f"{base} in {what}"
    if "bytes" in results:
        text += f": **{size(results['bytes'])} in place of {size(results['base_bytes'])}**"
    return " ".join(filter(None, (f"{text}.", _quality(results), _speed(results.get("bench")))))


def _quality(results: Mapping[str, Any]) -> str:
    kl, top1 = (((results.get("quality") or {}).get("metrics") or {}).get(name) for name in ("kl", "top1"))
    if kl is None or top1 is None:
        return f"What that cost: {'see below' if results.get('quality') else MISSING}."
    on = "inputs" if results["quality"].get("inputs") else "text"
    text = (
        f"On held-out {on} its most likely next token is the base's **{percent(top1['value'])}** of the time, and its "
        f"predictions differ by a KL divergence of **{number(kl['value'])} nats per token**"
    )
    text += "" if kl["low"] is None else f" [{interval_shown(kl, number, ', ')}]"
    within = (
        ", which cannot be told from the base's own rounding"
        if kl["within_noise"]
        else " (0 would mean the same predictions)"
    )
    budget = ", inside the budget it was given" if (results.get("gate") or {}).get("passed") else ""
    return f"{text}{within}{budget}."


def _speed(bench: Mapping[str, Any] | None) -> str:
    """Beside the base, for the smallest batch that was measured."""
    if bench is None or "base" not in bench or not bench["model"]["speed"] or not bench["base"]["speed"]:
        return ""
    model, base, machine = bench["model"]["speed"][0], bench["base"]["speed"][0], bench["machine"]
    where = machine["cpu"] if bench["model"]["where"] == "process" else next(iter(machine["gpus"]), None)
    return (
        f"On {md(where or 'the machine below')}, beside the base, it writes {_times(model, base, 'decode')} and reads prompts "
        f"{_times(model, base, 'prefill')} (batch {model['batch']})."
    )


def _times(model: Mapping[str, Any], base: Mapping[str, Any], what: str) -> str:
    """A speed beside the base's; equal where the difference is within the spread of both."""
    if not base[what] or abs(model[what] / base[what] - 1) <= max(model[f"{what}_spread"], base[f"{what}_spread"]):
        return "about as fast"
    return f"**{model[what] / base[what]:.2f} times** as fast"


def _base_link(source: Mapping[str, Any]) -> str:
    name = str(source["model"])
    return f"[{md(name)}](https://huggingface.co/{plain(name)})" if "/" in name else md(name)


def base(source: Mapping[str, Any]) -> str:
    """The base and its commit."""
    if "/" not in str(source["model"]):
        return f"{_base_link(source)}, a local folder"
    return _base_link(source) + (f" at {code(source['revision'])}" if source.get("revision") else "")


def method(recipe: Mapping[str, Any]) -> str:
    """The quantization steps in order, for each width if they differ."""
    steps = recipe.get("steps") or {"": [{"name": recipe["method"]}]}
    chains: dict[str, list[str]] = {}
    for bits, steps_of_bits in steps.items():
        chains.setdefault(", then ".join(STEPS.get(s["name"], code(s["name"])) for s in steps_of_bits), []).append(
            bits
        )
    descriptions = [chain if len(chains) == 1 else f"{', '.join(bits)}: {chain}" for chain, bits in chains.items()]
    trained = recipe.get("training")
    data = f", then {training(trained)}" if trained else "" if recipe.get("calibration") else ", without data"
    return "; ".join(descriptions) + data


def training(trained: Mapping[str, Any]) -> str:
    """What a model was trained on, for how long, and by which loss."""
    teacher = f" ({md(str(trained['teacher']))})" if trained["teacher"] else ""
    weight = trained.get("hidden_weight", 0)
    hidden = f" and {weight:g} times the relative error of its hidden states" if weight else ""
    begins = trained.get("checkpoint") or trained["start"]
    start = "" if begins == "rtn" else f", beginning from the codes of {code(begins)}"
    state = trained.get("kept")
    kept = ""
    if state is not None:
        kept = f"; step {state['step']:,} is kept, held-out loss {state['before']:.4f} -> {state['after']:.4f}"
    rest = " and everything else of the model" if trained["settings"].get("everything") else ""
    exactly = " in float32" if trained.get("float32") else ""
    return (
        f"trained{exactly} with the rounded weights{rest} for {trained['settings']['steps']:,} steps on {trained['tokens']:,} tokens of "
        f"{md(trained['text']['name'])} (sha256 {code(trained['text']['sha256'][:16])}) by "
        f"{trained['loss']}{teacher}{hidden}{start}{kept}"
    )


def modification(recipe: Mapping[str, Any]) -> str:
    """What differs from the base, as many licences ask for."""
    trained = recipe.get("training") or {}
    changed = trained.get("settings", {}).get("everything") and (trained.get("kept") or {}).get("step", 1)
    steps = {step["name"] for chain in (recipe.get("steps") or {}).values() for step in chain}
    if changed:
        rest = "all others were trained"
    elif trained.get("checkpoint"):
        rest = f"all others are those of {md(trained['checkpoint'])}"
    elif steps & RESCALING:
        rest = "norms, and layers whose outputs they read, were rescaled to match; everything else is the base's"
    else:
        rest = "everything else is the base's"
    return f"the quantized weights were changed by {'training and ' * bool(trained)}quantizing them; {rest}."


def format(recipe: Mapping[str, Any]) -> str:
    """The format of the weights."""
    fmt = formats().get(recipe["format"])
    if fmt is None:
        return code(recipe["format"])
    slugs = {recipe["scheme"], *recipe["schemes"].values()}  # the config has the default even if no layer uses it
    return fmt.description(map(QuantScheme.parse, slugs))


def loading(recipe: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The lines of Python that load the model."""
    where = json.dumps(plain(recipe.get("repo_id") or "path/to/this/folder"))
    quality = results.get("quality") or {}
    kind = quality.get("kind")
    if kind is None or quality.get("inputs"):  # what reads images or sounds has a class and a processor of its kind
        return f"import hf_quant\n\nmodel = hf_quant.load({where})"
    if "logits_cosine" in quality["metrics"]:  # it has a head, of whatever kind
        return (
            f"import hf_quant\nfrom transformers import AutoTokenizer\n\nmodel = hf_quant.load({where})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({where})"
        )
    auto = AUTO[kind]
    return (
        f"from transformers import {auto}, AutoTokenizer\n\nmodel = {auto}.from_pretrained({where})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({where})"
    )


def elsewhere(recipe: Mapping[str, Any]) -> str:
    """Programs that load it without this package; only those that were tested."""
    untested = "vLLM, SGLang and other engines: not checked with this model."
    fmt = formats().get(recipe["format"])
    tested = "" if fmt is None else fmt.elsewhere(map(QuantScheme.parse, recipe["schemes"].values()))
    return f"{tested} {untested}".strip()


def quality_rows(quality: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each metric: title, value, interval, noise of the base."""
    rows: list[tuple[str, ...]] = []
    for name in sorted(quality["metrics"], key=lambda n: list(TITLES).index(n) if n in TITLES else len(TITLES)):
        metric, (title, kind) = quality["metrics"][name], TITLES.get(name, (name, "number"))
        shown = {"percent": percent, "perplexity": "{:.3f}".format, "ratio": "{:.4f}".format}.get(kind, number)
        noise = "-" if metric["noise"] is None or name in OF_BASE else shown(metric["noise"])
        within = " (within noise)" if metric["within_noise"] else ""
        rows.append(
            (md(title + positions(metric)), shown(metric["value"]) + within, interval_shown(metric, shown), noise)
        )
    rows += [(md(TITLES.get(n, (n,))[0]), number(value), "-", "-") for n, value in quality["quantiles"].items()]
    return rows


def positions(metric: Mapping[str, Any]) -> str:
    """The end of a metric's title: at how many tokens it was measured, if not at all of them."""
    return f" ({metric['positions']:,} tokens)" if metric.get("positions") else ""


def by_reason(named: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason to the names that have it."""
    names_of: dict[str, list[str]] = {}
    for name, reason in named.items():
        names_of.setdefault(reason.partition(";")[0], []).append(name)
    return names_of


def command(recipe: Mapping[str, Any]) -> str:
    """The command that produces the same weights."""
    source, settings, calibration = recipe["source"], recipe.get("asked") or {}, recipe.get("calibration")
    trained = recipe.get("training")
    name = "train" if trained else "quantize"
    words = ["hf-quant", name, str(source["model"]), "-o", "OUT", "--scheme", recipe["scheme"]]
    words += ["--method", trained["start"] if trained else recipe["method"], "--format", recipe["format"]]
    words += training_options(trained, source) if trained else []
    words += ["--dtype", recipe["dtype"]] if "dtype" in recipe else []
    words += ["--revision", source["revision"]] if source.get("revision") else []
    words += ["--lm-head"] if settings.get("quantize_lm_head") else []
    words += ["--embeddings"] if settings.get("quantize_embeddings") else []
    for name, slug in (settings.get("overrides") or {}).items():
        words += ["--override", f"{name}={slug or 'float'}"] if slug != recipe["scheme"] else []
    for glob in settings.get("modules_to_not_convert") or []:
        words += ["--ignore", glob]
    if calibration:
        words += ["--calibration", calibration["name"]] if calibration["name"] not in UNNAMED_TEXTS else []
        if "sequences" in calibration:
            words += ["--calibration-tokens", str(calibration["sequences"] * calibration["context"])]
    rendered = (trained or {}).get("text") or calibration or {}
    if "chat_template_kwargs" in rendered:
        words += ["--chat-template-kwargs", json.dumps(rendered["chat_template_kwargs"])]
    if "epochs" in settings:
        words += ["--epochs", str(settings["epochs"]), *([] if "tuned" in recipe else ["--no-tune"])]
    return " ".join(f"\\\n  {word}" if word == "--override" else shell_word(word) for word in words)


def training_options(trained: Mapping[str, Any], source: Mapping[str, Any]) -> list[str]:
    """Those of ``hf-quant train`` alone."""
    settings, text, teacher = trained["settings"], trained["text"], trained["teacher"]
    return [
        "--data", text["name"], "--train-context", str(text["context"]), "--steps", str(settings["steps"]),
        "--batch", str(settings["batch"]), "--seed", str(settings["seed"]), "--lr", f"{trained['learning_rates'][-1][1]:g}",
        *(["--learn", "all"] if settings.get("everything") else []),
        *(["--hidden-weight", f"{trained['hidden_weight']:g}"] if trained.get("hidden_weight") else []),
        *(["--float32"] if trained.get("float32") else []),
        *(["--start", trained["checkpoint"]] if trained.get("checkpoint") else []),
        *([] if teacher == source["model"] else ["--teacher", "none" if teacher is None else teacher]),
    ]  # fmt: skip


def limits(recipe: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    """What readers should know before they use the model."""
    sentences, quality = [], results.get("quality")
    if quality and quality.get("inputs"):
        sentences.append(f"Measured on {md(amount_of(quality))}: inputs of other kinds were not.")
    elif quality:
        sentences.append(
            f"Measured on {quality['tokens']:,} tokens of one text: other languages and domains, and contexts longer than "
            f"{quality['context']} tokens, were not."
        )
    if not results.get("tasks"):
        sentences.append("No benchmark tasks were run.")
    if results.get("parameters", SMALL) < SMALL:
        sentences.append(
            f"With {results['parameters'] / 1e6:.1f}M parameters it is small: small models lose more by quantization."
        )
    sentences.append(
        "Safety and alignment were not evaluated again; what the base's card says of them may no longer hold."
    )
    sentences.append("Intended uses are those of the base, as far as the numbers above allow them.")
    return sentences


def licence(source: Mapping[str, Any]) -> str:
    """The sentences about the licence."""
    name = source.get("license_name") if source.get("license") == "other" else source.get("license")
    if not name:
        return "The base names no licence."
    link = source.get("license_link")
    target = f" ({md(str(link))})" if link else ""
    return f"Under the licence of the base, {_base_link(source)}: {code(name)}{target}."
