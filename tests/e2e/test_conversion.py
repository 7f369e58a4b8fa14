"""Checkpoints of other programs through the commands."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import hf_quant
from hf_quant.cli import main
from hf_quant.errors import FormatError
from hf_quant.jobs.convert import convert

FIXTURES = Path(__file__).parents[1] / "golden" / "fixtures"
IDS = torch.arange(1, 17)[None]


def run(*args: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def inspected(name: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(run("inspect", FIXTURES / name, "--json").stdout)
    return made


SEEN: dict[str, dict[str, Any]] = {
    "gptq-4bit-act-order": {"format": "gptq gptq", "bits": 4, "group_size": 64, "act_order": True, "layers_quantized": 7},
    "gptq-2bit-asym-v2": {"format": "gptq gptq_v2", "bits": 2, "group_size": 16, "symmetric": False, "act_order": False},
    "gptq-mixed": {"schemes": {"W4A16-g128": 5, "W8A16-g64": 1}, "matrices_in_floating_point": 3},
    "awq-gemv": {"format": "awq gemv", "bits": 4, "group_size": 64, "symmetric": False},
    "auto-round": {"format": "auto-round auto_round:auto_gptq", "bits": 4, "group_size": 128, "symmetric": True},
    "ct-4bit-act-order": {"format": "compressed-tensors pack-quantized", "bits": 4, "group_size": 32, "act_order": True},
    "ct-3bit-old": {"format": "compressed-tensors pack-quantized", "bits": 3, "group_size": 64},
    "ct-w8a8": {"format": "compressed-tensors int-quantized", "bits": 8, "group_size": -1, "schemes": {"W8A8": 7}, "notes": []},
    "ct-fp8-block": {"bits": None, "schemes": {"floating point: 8-bit floats": 7}, "layers_quantized": 7},
    "bnb-nf4-double": {"format": "bitsandbytes", "bits": 4, "group_size": 64, "codebook": "nf4"},
    "bnb-int8": {"format": "bitsandbytes", "bits": 8, "group_size": -1, "codebook": None},
    "hqq-3bit": {"format": "hqq", "bits": 3, "group_size": 64, "symmetric": False},
    "torchao-int4-unpacked": {"format": "torchao", "bits": 4, "group_size": 32},
    "quanto-int8": {"format": "quanto", "bits": 8, "group_size": -1},
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_inspect_names_what_is_quantized_and_how(name: str) -> None:
    record = inspected(name)
    assert {key: record[key] for key in SEEN[name]} == SEEN[name]
    assert "model.embed_tokens" in record["left"]
    assert record["format"] in run("inspect", FIXTURES / name).stdout


def test_inspect_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_quant.checkpoint.folder import Checkpoint

    read = Checkpoint.read
    sizes: list[int] = []

    def watched(self: Checkpoint, name: str) -> torch.Tensor:
        sizes.append(self.tensors[name].nbytes)
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "read", watched)
    for name in SEEN:
        inspected(name)
    assert max(sizes) <= 1024


def test_convert_and_verify(tmp_path: Path) -> None:
    source, out = FIXTURES / "gptq-4bit-asym", tmp_path / "out"
    record = json.loads(
        run("convert", source, "--to", "compressed-tensors", "-o", out, "--target", "vllm", "--json").stdout
    )
    assert record["identical"] and record["layers"] == 7 and record["from"] == "gptq"
    assert record["kernels"] == {"Marlin": 7}
    with torch.no_grad():
        models = [hf_quant.load(str(path), dtype=torch.float16) for path in (source, out)]
        assert torch.equal(*(model(IDS).logits for model in models))
    assert json.loads(run("verify", out, "--json").stdout)["layers_quantized"] == 7
    assert run("verify", source, "-q").stdout == "sound\n"
    assert "exists and is not empty" in run("convert", source, "--to", "gptq", "-o", out, code=1).stderr
    assert run("convert", source, "--to", "dense", "-o", out, "--overwrite", "-q").stdout == f"{out}\n"
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["gptq-4bit-act-order", "--to", "awq"], 1, "in the order of the columns only"),
        (["bnb-nf4", "--to", "gptq"], 1, "integers with integer zero points only"),
        (["ct-fp8-block", "--to", "native"], 1, "--to dense makes it floating point"),
        (["gptq-4bit-asym", "--to", "gptq", "--target", "vllm"], 1, "without zero points"),
        (["gptq-4bit", "--to", "gptq", "--target", "vllm", "--tp", "3"], 1, "cannot be split over 3 GPUs"),
        (["gptq-4bit", "--to", "native", "--target", "vllm"], 1, "does not read native"),
        (["gptq-4bit", "--to", "ggml"], 2, "gguf"),
        (["bnb-nf4", "--to", "gguf"], 1, "codebook"),
        (["gptq-4bit-act-order", "--to", "gguf"], 1, "natural order"),
        (["gptq-4bit", "--to", "gptq", "--tp", "2"], 2, "name a --target"),
    ],
)
def test_refusals(tmp_path: Path, args: list[str], code: int, said: str) -> None:
    name, *rest = args
    result = run("convert", FIXTURES / name, *rest, "-o", tmp_path / "out", code=code)
    assert said in result.stderr and not (tmp_path / "out").exists()


def test_embeddings_and_transposed_layers_are_refused_where_readers_expect_linear_layers(
    zoo: Any, tmp_path: Path
) -> None:
    for name, options, said in (
        ("llama", {"quantize_embeddings": True}, "a table of embeddings"),
        ("gpt2", {}, "a transposed linear layer"),
    ):
        arch, folder = zoo(name)
        config = hf_quant.HfQuantConfig("W4A16-g32-asym", format="native", **options)
        arch.auto.from_pretrained(folder, quantization_config=config).save_pretrained(tmp_path / name)
        for to in ("compressed-tensors", "awq"):
            with pytest.raises(FormatError, match=said):
                convert(tmp_path / name, tmp_path / "out", to=to)
        assert not (tmp_path / "out").exists()
        convert(tmp_path / name, tmp_path / f"{name}-mlx", to="mlx" if name == "llama" else "gptq")


def test_a_tied_output_head_is_named_among_what_stays(zoo: Any, tmp_path: Path) -> None:
    arch, folder = zoo("llama-tied")
    config = hf_quant.HfQuantConfig("W4A16-g32", format="native")
    arch.auto.from_pretrained(folder, quantization_config=config).save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "ct", to="compressed-tensors")
    stored = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in stored["ignore"]


def test_what_is_not_quantized_is_not_converted(tmp_path: Path) -> None:
    run("convert", FIXTURES / "gptq-4bit", "--to", "dense", "-o", tmp_path / "dense")
    result = run("convert", tmp_path / "dense", "--to", "gptq", "-o", tmp_path / "out", code=1)
    assert "no quantization_config" in result.stderr


def test_verify_names_what_is_damaged(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "gptq-4bit", tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2] + b"\x00\x7c")  # infinity, in the last scale
    assert "v_proj: scales: 1 scales are not finite" in run("verify", tmp_path / "q", code=1).stderr
    file.write_bytes(file.read_bytes()[:-9])
    assert "truncated" in run("verify", tmp_path / "q", code=1).stderr


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "gpt2", "phi3", "gemma2", "bert-mlm", "t5", "mixtral", "qwen3-moe", "llava"]
)
@pytest.mark.parametrize("scheme", ["W4A16-g32-asym", "W8A16-g-1"])
def test_every_architecture_through_gptq_and_back_to_floats(zoo: Any, tmp_path: Path, name: str, scheme: str) -> None:
    arch, folder = zoo(name)
    config = hf_quant.HfQuantConfig(scheme, format="native")
    model = arch.auto.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "gptq", to="gptq")
    asked = hf_quant.HfQuantConfig()
    again, info = arch.auto.from_pretrained(tmp_path / "gptq", quantization_config=asked, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert torch.equal(arch.run(again), arch.run(model))
    convert(tmp_path / "gptq", tmp_path / "dense", to="dense")
    plain, info = arch.auto.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    torch.testing.assert_close(arch.run(plain), arch.run(model.dequantize()), rtol=1e-2, atol=1e-2)


def test_stacks_that_cannot_be_taken_apart_are_refused(zoo: Any, tmp_path: Path) -> None:
    arch, folder = zoo("gpt-oss")
    arch.auto.from_pretrained(folder, quantization_config=hf_quant.HfQuantConfig("W4A16-g32")).save_pretrained(
        tmp_path / "q"
    )
    with pytest.raises(FormatError, match="stacked"):
        convert(tmp_path / "q", tmp_path / "gptq", to="gptq")
    convert(tmp_path / "q", tmp_path / "n", to="native")
    models = [arch.auto.from_pretrained(tmp_path / name) for name in ("q", "n")]
    assert torch.equal(*map(arch.run, models))
    convert(tmp_path / "q", tmp_path / "dense", to="dense")
    plain = arch.run(arch.auto.from_pretrained(tmp_path / "dense"))
    torch.testing.assert_close(plain, arch.run(models[0].dequantize()), rtol=1e-2, atol=1e-2)
