"""The commands, as a user calls them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_quant
import hf_quant.disk.folders
import hf_quant.evaluation.yardstick
from hf_quant.cli import main
from hf_quant.data.text import paragraphs
from hf_quant.jobs.ladder import _trial
from hf_quant.jobs.texts import Measuring

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tiny: Path) -> Path:
    """A tiny model with a byte-level tokenizer and a held-out text beside it."""
    return tiny


def run(*args: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_quantize_one_scheme(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    result = run(
        "quantize", folder, "-o", out, "--bits", 4, "--group-size", 32, "--asym", "--prompt", "some", "--json"
    )
    record = json.loads(result.stdout)
    (row,) = record["results"]
    assert (
        row["scheme"] == "W4A16-g32-asym"
        and row["quality"]["metrics"]["kl"]["value"] > 0
        and record["generated"].startswith("some")
    )
    assert row["bytes"] == (out / "model.safetensors").stat().st_size
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["source"] == {"model": "tiny", "revision": None} and str(tmp_path) not in json.dumps(recipe)
    assert recipe["schemes"]["model.layers.0.mlp.up_proj"] == "W4A16-g32-asym" and "lm_head" in recipe["left"]
    assert json.loads((out / "results.json").read_text())["quality"] == row["quality"]
    assert "in floating point: lm_head" in result.stderr
    assert hf_quant.load(str(out)).can_generate()
    assert [p.name for p in tmp_path.iterdir()] == ["q"], "no stage is left"


def test_quantize_several_schemes(folder: Path, tmp_path: Path) -> None:
    schemes = [arg for bits in (8, 4, 3, 2) for arg in ("--scheme", f"W{bits}A16-g32")]
    record = json.loads(run("quantize", folder, "-o", tmp_path / "all", *schemes, "--max-kl", 99, "--json").stdout)
    sizes = [row["bits_per_weight"] for row in record["results"]]
    costs = [row["quality"]["metrics"]["kl"]["value"] for row in record["results"]]
    assert sizes == sorted(sizes, reverse=True) and costs == sorted(costs)
    assert {p.name for p in (tmp_path / "all").iterdir()} == {f"W{bits}A16-g32" for bits in (8, 4, 3, 2)}
    table = run("quantize", folder, "-o", tmp_path / "t", "--group-size", 32, "--no-eval").stdout
    assert table.splitlines()[0].startswith("scheme") and "W4A16-g32" in table
    assert run("quantize", folder, "-o", tmp_path / "u", "--group-size", 32, "-q").stdout == f"{tmp_path / 'u'}\n"


def test_eval_inspect_plan_doctor(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    run("quantize", folder, "-o", out, "--scheme", "W4A16-g32", "--format", "native", "--no-eval", "-q")
    record = json.loads(
        run("eval", out, "--context", 64, "--json").stdout
    )  # the folder it was made from is remembered
    copy = shutil.copytree(out, tmp_path / "copy")
    assert "say where it is with --base" in run("eval", copy, code=1).stderr
    quality = record["quality"]
    assert quality["metrics"]["kl"]["value"] > 0 and quality["context"] == 64
    assert json.loads((out / "results.json").read_text())["quality"] == quality
    seen = json.loads(run("inspect", out, "--json").stdout)
    assert seen["format"] == "hf_quant native" and seen["bits"] == 4 and seen["layers_quantized"] == 14
    plain = json.loads(run("inspect", folder, "--json").stdout)
    assert plain["format"] == "not quantized" and plain["layers_quantized"] == 0
    (plan,) = json.loads(run("plan", folder, "--scheme", "W2A16-g32", "--json").stdout)["plans"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert plan["parameters"] == model.num_parameters() and len(plan["advice"]) == 4
    assert plan["bytes_before"] == 4 * model.num_parameters()
    assert plan["kv_cache_bytes"] == 2 * 2 * 2 * 64 * model.config.max_position_embeddings
    for command, model in (("inspect", out), ("verify", out), ("plan", folder)):
        assert "only models on the Hub have revisions" in run(command, model, "--revision", "x", code=2).stderr
    assert "hf-quant plan" in run("inspect", folder, "--target", "vllm", code=2).stderr
    (out / "manifest.json").symlink_to(tmp_path / "nowhere")
    assert "manifest.json: is not a file" in run("verify", out, code=1).stderr
    lines = run("doctor", "--no-speed").stdout.splitlines()
    assert sum(line.startswith("W") for line in lines) == 6 and not any("not cpu" in line for line in lines), (
        "a line a scheme"
    )
    assert "    not triton_wna16: " in run("doctor", "--no-speed", "--verbose").stdout


def test_a_tied_model_is_counted_once(zoo: Any) -> None:
    _, path = zoo("llama-tied")
    (plan,) = json.loads(run("plan", path, "--group-size", 32, "--json").stdout)["plans"]
    assert plan["parameters"] == AutoModelForCausalLM.from_pretrained(path).num_parameters()
    assert "lm_head (the same numbers as another weight)" in " ".join(
        run("plan", path, "--group-size", 32).stdout.split()
    )


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--bits", "5"], 2, "is not one of 8, 4, 3, 2"),
        (["--scheme", "W4"], 2, "not a scheme"),
        (["--scheme", "W5A16-g32"], 2, "codes of 5 bits can be read and run, not made"),
        (["--override", "*=W6A16-g32"], 2, "codes of 6 bits can be read and run, not made"),
        (["--scheme", "W8A8-o1%-columns"], 2, "outlier columns of the activations must be found by calibration"),
        (["--scheme", "W8A8-static"], 2, "the range of the activations must be found by calibration"),
        (["--group-size", "48"], 2, "group_size"),
        (["--override", "nothing=W8A16-g32"], 2, "matches no layer"),
        (["--override", "lm_head"], 2, "GLOB=SCHEME"),
        (["--format", "gguf"], 2, "format"),
        (["--method", "magic"], 2, "method"),
        (["--text", "/nowhere.txt"], 1, "no such file"),
        (["--nonsense"], 2, "No such option"),
    ],
)
def test_nothing_is_left_after_an_error(folder: Path, tmp_path: Path, args: list[str], code: int, said: str) -> None:
    result = run("quantize", folder, "-o", tmp_path / "q", *args, code=code)
    assert said in result.stderr and not result.stdout and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["ladder", "MODEL", "--max-size", "1kB", "--group-size", "32"], 2, "the smallest model, W2A16-g32-asym, has"),
        (["convert", "none.gguf", "--to", "native"], 1, "none.gguf: no such file"),
        (["convert", "MODEL", "--to", "gguf", "-o", "one.gguf"], 2, "name a folder; the file in it is model.gguf"),
    ],
)
def test_refused_before_anything_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    output = [] if "-o" in args else ["-o", "q"]
    result = run(*(str(folder) if arg == "MODEL" else arg for arg in args), *output, code=code)
    assert said in " ".join(result.stderr.split()) and not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert "overwrite" in run("quantize", folder, "-o", tmp_path, "--group-size", 32, "--no-eval", code=1).stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_damaged_source(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:-9] if file.suffix == ".safetensors" else content)
    for command in (["quantize", "-o", tmp_path / "q"], ["inspect"], ["plan"]):
        assert "model.safetensors" in run(command[0], broken, *command[1:], code=1).stderr
    assert not (tmp_path / "q").exists()


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from hf_quant.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("bench", "convert", "doctor", "eval", "inspect", "ladder", "plan", "quantize", "report"):
        assert command in done.stdout


@pytest.fixture(scope="module")
def checked() -> Any:
    """Checks a folder's results.json against the schema that documents it."""
    schema = json.loads((Path(hf_quant.__file__).parent / "publish" / "schemas" / "results.schema.json").read_text())

    def check(folder: Path) -> Any:
        record = json.loads((folder / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
        jsonschema.validate(record, schema)
        return record

    return check


def test_a_missed_gate(folder: Path, tmp_path: Path, checked: Any) -> None:
    out = tmp_path / "q"
    call = ["quantize", folder, "-o", out, "--scheme", "W2A16-g32"]
    assert "2 bits break most models, so they need a gate" in run(*call, code=2).stderr
    assert "need a gate" in run(*call[:-1], "W4A16-g32", "--override", "*.up_proj=W2A16-g32", code=2).stderr
    result = run(*call, "--max-kl", "0.001", "--min-top1", "99.9%", "--max-ppl-increase", "1e11%", code=3)
    assert "gate missed: KL" in result.stderr and "gate missed: top-1 agreement" in result.stderr
    assert "layers farthest" in result.stderr and "increase of perplexity" not in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["q-failed"]
    record = checked(tmp_path / "q-failed")
    assert record["gate"]["budget"] == {"max_kl": 0.001, "min_top1": pytest.approx(0.999), "max_ppl_increase": 1e9}
    assert not record["gate"]["passed"] and len(record["gate"]["misses"]) == 2 and record["folder"] == "q-failed"
    assert hf_quant.load(str(tmp_path / "q-failed")).can_generate()
    assert "q-failed: exists and is not empty; --overwrite" in run(*call, "--max-kl", "99", code=1).stderr
    run(*call, "--max-kl", "99", "--overwrite")
    assert checked(out)["gate"] == {"budget": {"max_kl": 99.0}, "passed": True, "misses": []}
    assert "gate missed" in run("eval", out, "--base", folder, "--max-kl", "0.001", code=3).stderr
    assert not checked(out)["gate"]["passed"]
    result = run("quantize", folder, "-o", tmp_path / "x", "--no-eval", "--max-kl", 1, code=2)
    assert "cannot go with --no-eval" in result.stderr


def test_a_broken_layer_is_caught_and_named(folder: Path, tmp_path: Path, checked: Any) -> None:
    """One layer's scales doubled in the file."""
    out, name = tmp_path / "q", "model.layers.1.mlp.up_proj"
    run("quantize", folder, "-o", out, "--scheme", "W8A16-g32", "--max-kl", "0.01", "-q")
    tensors = load_file(out / "model.safetensors")
    tensors[f"{name}.weight_scale"] *= 2
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    result = run("eval", out, "--base", folder, "--max-kl", "0.01", code=3)
    assert "gate missed" in result.stderr and f"weights: {name} (100" in result.stderr
    assert checked(out)["layers"][0]["layer"] == name
    page = Path(run("report", out, "-q").stdout.strip()).read_text()
    assert "Missed its budget" in page and f"Look first at <b>{name}</b>" in page


def test_bench_and_report(folder: Path, tmp_path: Path, checked: Any) -> None:
    out = tmp_path / "<b>q"
    run("quantize", folder, "-o", out, "--scheme", "W4A16-g32", "--format", "native", "-q")
    few = ["--batch", 1, "--batch", 2, "--prompt-tokens", 8, "--new-tokens", 3, "--repeats", 3]
    record = json.loads(run("bench", out, "--base", folder, *few, "--json").stdout)
    assert checked(out)["bench"] == record
    for role in ("base", "model"):
        assert [s["batch"] for s in record[role]["speed"]] == [1, 2] and record[role]["load_seconds"] > 0
        assert all(s["prefill"] > 0 and s["decode"] > 0 and s["first_token"] > 0 for s in record[role]["speed"])
    assert record["model"]["weight_bytes"] < record["base"]["weight_bytes"]
    assert record["base"]["weight_bytes"] >= (folder / "model.safetensors").stat().st_size - 10_000
    alone = json.loads(run("bench", out, "--alone", *few, "--json").stdout)
    assert "base" not in alone and alone["slower"] == []
    page = Path(run("report", out, "-q").stdout.strip()).read_text()
    assert "&lt;b&gt;q" in page and "<b>q" not in page and "http" not in page.replace("http-equiv", "")
    before = (out / "config.json").read_text()
    two = Path(run("report", out, out, "--prompt", "some words", "-q").stdout.strip()).read_text()
    assert "<h1>tiny, W4A16-g32 and tiny, W4A16-g32</h1>" in two and "some words …" in two and "<mark>" in two
    run("report", out, "-q")  # a report is replaced, and nothing else
    assert "is there already" in run("report", out, "-o", out / "config.json", code=1).stderr
    assert (out / "config.json").read_text() == before
    assert "Speed and memory" in page and "KL divergence" in page
    assert "measure first" in run("report", tmp_path, "--base", folder, "--samples", code=1).stderr
    assert "there is no folder" in run("report", out, "--samples", "-o", tmp_path / "no" / "r.html", code=1).stderr
    assert "has no tokens" in run("report", out, "--base", folder, "--prompt", "", code=1).stderr
    assert "--base: nothing here runs a model" in run("report", out, "--base", folder, code=2).stderr
    assert "--trust-remote-code: nothing here" in run("report", out, "--trust-remote-code", code=2).stderr


def test_ladder(folder: Path, tmp_path: Path, checked: Any) -> None:
    out = tmp_path / "small"
    assert "say what to keep" in run("ladder", folder, "-o", out, code=2).stderr
    call = ["ladder", folder, "-o", out, "--group-size", 32, "--trial-tokens", 128, "--context", 64]
    record = json.loads(run(*call, "--max-kl", "0.1", "--json").stdout)
    uniform = [r for r in record["rungs"] if r["name"].startswith("W")]
    sizes = [r["bytes"] for r in uniform]
    assert sizes == sorted(sizes, reverse=True) and uniform[-1]["misses"]
    chosen = next(r for r in record["rungs"] if r["bytes"] == record["chosen_bytes"])
    assert chosen["quality"]["metrics"]["kl"]["value"] <= 0.1
    assert record["chosen_bytes"] < min(r["bytes"] for r in uniform if not r["misses"])
    results, stored = checked(out), json.loads((out / "ladder.json").read_text())
    assert results["gate"]["passed"] and len(results["layers_by_scheme"]) > 1
    assert results["quality"]["metrics"]["kl"]["value"] == chosen["quality"]["metrics"]["kl"]["value"]
    assert stored == record and len(record["sensitivity"]["kl"]) == 8
    assert {p.name for p in out.glob("*.png")} == {
        f"{chart}-{ground}.png" for chart in ("size_and_kl", "sensitivity") for ground in ("light", "dark")
    }
    page = Path(run("report", out, "-q").stdout.strip()).read_text()
    assert 'data-chart="0-ladder"' in page and '"kind": "scatter"' in page and 'data-chart="0-sensitivity-4"' in page
    assert "overwrite" in run(*call, "--max-kl", "0.1", code=1).stderr
    lost = run("ladder", folder, "-o", tmp_path / "none", "--max-kl", "1e-12", "--context", 64, code=3)
    assert "no rung is inside" in lost.stdout and "W8A16-g128: KL" in lost.stderr and not (tmp_path / "none").exists()
    limit = uniform[1]["bytes"] + 2000
    best = json.loads(run(*call[:3], tmp_path / "best", *call[4:], "--max-size", f"{limit}B", "--json").stdout)
    assert best["chosen_bytes"] <= limit


def test_the_ladder_refuses_before_it_measures(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {name: tmp_path / f"{name}.txt" for name in ("documents", "short")}
    texts["documents"].write_text("<|endoftext|>".join(f"document {i}" for i in range(40)))
    texts["short"].write_text("some words to measure on")
    call = ["ladder", folder, "-o", tmp_path / "q", "--max-kl", 1, "--group-size", 32]
    monkeypatch.setattr(hf_quant.evaluation.yardstick.Base, "load", None)
    assert "no such file" in run(*call, "--trial-text", tmp_path / "nosuch.txt", code=1).stderr
    assert "learns nothing" in run(*call, "--method", "rtn", "--epochs", 3, code=2).stderr
    assert "leave it out" in run(*call, "--method", "rtn", "--max-memory", "1GB", code=2).stderr
    assert "--calibration-tokens: --method rtn" in run(*call, "--calibration-tokens", 99, code=2).stderr
    halves = run(*call, "--text", texts["documents"], "--context", 250, code=1).stderr
    assert "the documents that choose: the text has 235 tokens, fewer than one window of 250" in halves.replace(
        "\n", " "
    )
    assert "for sensitivities" in run(*call, "--trial-text", texts["short"], "--context", 64, code=1).stderr


def test_sensitivities_are_measured_in_the_windows_that_were_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = Measuring(None, None, 64, 32, None, "float32", False)
    monkeypatch.setattr(hf_quant.evaluation.yardstick.Base, "reference", lambda *_, **options: options)
    base = hf_quant.evaluation.yardstick.Base(str(folder))
    report = SimpleNamespace(say=lambda _: None)
    asked = _trial(base, None, how, "choosing", None, 99, report)  # type: ignore[arg-type]
    assert (asked["context"], asked["stride"], asked["max_tokens"]) == (64, 32, 99)


def test_ladder_of_a_calibrated_method(
    folder: Path, tmp_path: Path, checked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is chosen on half of the documents and measured on the other half; OUT has everything in it when it appears."""
    text, looked_at, out = tmp_path / "text.txt", tmp_path / "calibration.txt", tmp_path / "small"
    text.write_text("<|endoftext|>".join(f"document {i} says {i * i} and {i % 7}, " * (2 + i % 4) for i in range(44)))
    looked_at.write_text("something else to look at, one time and again\n" * 40)
    call = ["ladder", folder, "-o", out, "--group-size", 32, "--trial-tokens", 64, "--context", 32, "--text", text]
    call += ["--max-kl", 0.5, "--json"]
    assert "looks at no text" in run(*call, "--method", "rtn", "--calibration", looked_at, code=2).stderr
    told: list[set[str]] = []
    real = hf_quant.disk.folders._swap
    monkeypatch.setattr(
        hf_quant.disk.folders,
        "_swap",
        lambda stage, to: (told.append({p.name for p in stage.iterdir()}) if to == out else None, real(stage, to)),
    )
    record = json.loads(run(*call, "--calibration", looked_at).stdout)
    assert {"ladder.json", "results.json", "recipe.json", "size_and_kl-dark.png"} < told[0]
    quality = checked(out)["quality"]
    assert quality == record["held_back"] and quality["documents"] == 22
    chosen = next(r for r in record["rungs"] if r["bytes"] == record["chosen_bytes"])
    assert chosen["quality"]["text_sha256"] != quality["text_sha256"] and chosen["quality"]["documents"] == 22
    assert json.loads((out / "recipe.json").read_text())["method"] == "calibrated"  # since there is a text for it


def test_measuring_the_wrong_thing_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    run("quantize", folder, "-o", out, "--scheme", "W4A16-g32", "--no-eval", "-q")
    recipe = json.loads((out / "recipe.json").read_text())
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(f"{i} " + "words to calibrate on " * 12 for i in range(9)))
    recipe["calibration"] = {
        "name": text.name, "sequences": 9, "context": 64, "sha256": "0" * 64,
        "paragraphs": sorted(paragraphs(text.read_text())),
    }  # fmt: skip
    (out / "recipe.json").write_text(json.dumps(recipe))
    call = ["eval", out, "--base", folder, "--text", text, "--context", 64]
    assert (
        "9 of 9 paragraphs of the evaluation text also occur in the calibration or training data"
        in run(*call, code=1).stderr
    )
    run(*call, "--allow-overlap")
    (tmp_path / "rows.txt").write_text("one row\nanother row\n")
    assert "fewer than one window" in run(*call[:-4], "--text", tmp_path / "rows.txt", code=1).stderr
    vocabulary = json.loads((out / "tokenizer.json").read_text())
    one, two = list(vocabulary["model"]["vocab"])[:2]
    vocabulary["model"]["vocab"] |= {one: 1, two: 0}
    (out / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert "tokenizer of" in run(*call, "--allow-overlap", code=1).stderr


def test_evaluation_refuses_before_it_measures_and_stores_what_belongs_to_the_model(
    folder: Path, tmp_path: Path, checked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other, few = tmp_path / "q", tmp_path / "other", ["--max-tokens", 512, "--context", 64]
    run("quantize", folder, "-o", out, "--scheme", "W3A16-g32", *few, "--max-kl", 99, "-q")
    shutil.copytree(folder, other)
    before = checked(out)
    assert "is MODEL itself" in run("eval", out, "--base", out, *few, code=1).stderr
    assert "nothing is stored" in run("eval", out, "--base", other, *few, "--max-kl", 98, "-q").stderr
    assert checked(out) == before
    run("eval", out, *few, "--max-kl", "1e-6", code=3)
    assert checked(out)["gate"]["budget"] == {"max_kl": 1e-6}
    monkeypatch.setattr(hf_quant.evaluation.yardstick.Base, "load", None)  # nothing below gets as far as that
    longer = ["--text", folder / "heldout.txt", "--context", 4096]
    assert "longer than the 2,048 positions" in run("eval", out, *longer, code=1).stderr
    assert "leave it out, or --base" in run("bench", out, "--alone", "--base", folder, code=2).stderr
    assert "more than the 2,048 positions" in run("bench", out, "--prompt-tokens", 2048, code=2).stderr
    assert "one of the names is empty" in run("eval", out, "--tasks", "a,,b", code=2).stderr
    assert "leave --tasks out" in run("eval", out, "--kv-cache", "int8", "--tasks", "a", code=2).stderr
    for file, damaged in (("results.json", "{oops"), ("recipe.json", "{oops")):
        (out / file).write_text(damaged)
        assert f"{file}: Expecting property name" in run("eval", out, *few, code=1).stderr
        assert f"{file}: Expecting property name" in run("bench", out, code=1).stderr


def test_an_encoder_is_measured_on_the_bundled_text(zoo: Any, folder: Path, tmp_path: Path, checked: Any) -> None:
    _, path = zoo("bert-mlm")
    source, out = tmp_path / "bert", tmp_path / "q"
    shutil.copytree(path, source)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / file, source)
    few = ["--context", 48, "--max-tokens", 2000]
    call = ("quantize", source, "-o", out, "--scheme", "W8A16-g32", *few)
    refused = run(*call, "--max-kl", 1, code=1).stderr
    assert "not measured for encoder" in refused and "quantized" not in refused, "said before any work"
    made = run(*call, "--min-top1", "50%", "--min-cosine", "90%")
    assert checked(out)["gate"]["budget"] == {"min_top1": 0.5, "min_cosine": pytest.approx(0.9)}
    quality = checked(out)["quality"]
    assert f"{quality['metrics']['embedding_cosine']['value']:.5f}" in made.stdout
    assert 0.5 < quality["metrics"]["top1"]["value"] <= 1
    assert quality["kind"] == "encoder" and 0.99 < quality["metrics"]["embedding_cosine"]["value"] < 1
    result = run("eval", out, "--base", source, *few)
    assert "embedding_cosine" in result.stdout and "bundled text" in result.stderr
    assert "do not overlap: leave it out" in run("eval", out, *few, "--stride", 16, code=2).stderr
    assert "--min-cosine 99% limits what is" in run("eval", out, "--max-kl", 1, code=1).stderr
    missed = run("eval", out, *few, "--min-cosine", "100%", code=3).stderr
    assert "cosine similarity of embeddings" in missed and not checked(out)["gate"]["passed"]
    record = checked(out)
    del record["gate"]
    (out / "results.json").write_text(json.dumps(record))
    assert "for example --min-cosine 99%" in run("push", out, "a/b", "--dry-run", code=3).stderr.replace("\n", " ")
    of_causal = ("quantize", folder, "-o", tmp_path / "x", "--group-size", 32, "--min-cosine", "90%")
    assert "not measured for models that predict tokens" in run(*of_causal, code=1).stderr
    assert "keeps none" in run("eval", out, "--max-tokens", 2000, "--kv-cache", "int8", code=1).stderr
    assert "not measured for encoder" in run("eval", out, "--base", source, *few, "--max-kl", 1, code=1).stderr


def test_training_in_progress_is_said(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint-10"
    shutil.copytree(folder, source)
    (source / "optimizer.pt").write_bytes(b"")
    result = run("quantize", source, "-o", tmp_path / "q", "--group-size", 32, "--no-eval")
    assert "may still be training" in result.stderr


@pytest.mark.skipif(not (REPO / "examples").is_dir(), reason="no examples beside the tests")
def test_the_example_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, REPO / "examples" / "quantize.py", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.startswith("The following functions are"), done.stderr
