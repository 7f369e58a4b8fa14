"""What is wrong with the arguments is said at once, before torch is imported, in a sentence that names what works."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, sys, time
from click.testing import CliRunner
from hf_quant.cli import main
for args in json.loads(sys.stdin.read()):
    start = time.process_time()
    result = CliRunner().invoke(main, args)
    imported = "torch" in sys.modules or "transformers" in sys.modules
    print(json.dumps([result.exit_code, result.stderr, time.process_time() - start, imported]))
"""
CASES = [  # command and options, exit code, what is said
    ("quantize M -o Q --scheme W4A16-g32 --bits 4", 2, "give one of them"),
    ("quantize M -o Q --scheme W4A16-g32 --asym", 2, "--asym"),
    ("quantize M -o Q --scheme W4A16-g32 --scheme W4A16-g32", 2, "twice"),
    ("quantize M -o Q --scheme W4", 2, "not a scheme"),
    ("quantize M -o Q --bits 5", 2, "is not one of 8, 4, 3, 2"),
    ("quantize M -o Q --method magic", 2, "there is awq, calibrated"),
    ("quantize M -o Q --dtype int4", 2, "auto, float32, bfloat16, float16"),
    ("quantize M -o Q --override lm_head", 2, "GLOB=SCHEME"),
    ("quantize M -o Q --override lm_head=W9", 2, "not a scheme"),
    ("quantize M -o Q --bits 2", 2, "need a gate"),
    ("quantize M -o Q --max-kl 1 --no-eval", 2, "cannot go with --no-eval"),
    ("quantize M -o Q --dataset c4 --no-eval", 2, "cannot go with --no-eval"),
    ("quantize M -o Q --text /nowhere.txt", 1, "no such file"),
    ("quantize M -o Q --inputs /nowhere.safetensors", 1, "no such file"),
    (
        "eval M --inputs /nowhere.txt",
        2,
        "not a safetensors file of inputs by their names; --text or --dataset name a text",
    ),
    ("ladder M -o Q --max-kl 1 --inputs a.safetensors", 2, "quantize and eval measure one scheme on inputs"),
    ("quantize M -o Q --calibration /nowhere.txt --method gptq", 1, "no such file"),
    ("train M -o Q --scheme W4A16-g32 --data nowhere.txt", 1, "--data nowhere.txt: no such file"),
    ("quantize M -o Q --calibration-tokens 0 --method gptq", 2, "0 is not in the range"),
    ("quantize M -o Q --calibration-tokens 99", 2, "--calibration-tokens: --method rtn looks at no text"),
    ("quantize M -o Q --method hqq --max-memory 4K", 2, "--max-memory: --method hqq looks at no text"),
    ("quantize M -o Q --min-top1 95", 2, "write it with a percent sign"),
    ("quantize M -o Q --min-top1 101%", 2, "more than 100%"),
    ("quantize M -o Q --max-ppl-increase 1", 2, "write it with a percent sign"),
    ("quantize M -o Q --max-ppl-increase -1%", 2, "not a share"),
    ("quantize M -o Q --max-kl nan", 2, "not a number"),
    ("quantize M -o Q --method gptq --max-memory 4K --max-shard-size big", 2, "'big' is not a size"),
    ("quantize M -o Q --context 1", 2, "range"),
    ("quantize M -o Q --context 64 --stride 65", 2, "more than --context"),
    ("quantize M -o Q --text a --dataset b", 2, "give one of them"),
    ("ladder M -o Q --max-size 4X", 2, "4GB"),
    (
        "train M -o Q --data M/heldout.txt --seed 99999999999999999999",
        2,
        "--seed 99999999999999999999: must be a whole number from 0 to",
    ),
    ("train M -o Q --data M/heldout.txt --seed -1", 2, "--seed -1: must be a whole number from 0 to"),
    ("generate M -o Q.safetensors --seed 99999999999999999999", 2, "--seed 99999999999999999999: must be"),
    ("train M -o Q --data rows.parquet", 1, "Dataset.from_parquet('rows.parquet').to_json('data.jsonl') writes JSONL"),
    ("quantize M -o Q --method gptq --calibration rows.parquet", 1, "--calibration rows.parquet: is a table"),
    ("quantize M -o Q --text rows.parquet", 1, "--text rows.parquet: is a table"),
    ("train M -o Q --data rows.jsonl.gz", 1, "--data rows.jsonl.gz: is packed: unpack it first"),
    ("ladder M -o Q --max-kl 0.1 --method magic", 2, "there is awq, calibrated"),
    ("plan M --scheme W4A16-g32 --group-size 64", 2, "--group-size"),
    ("plan model.gguf", 1, "GGUF"),
    ("plan model.safetensors", 1, "name the folder that holds it"),
    ("plan adapter", 1, "merge_and_unload"),
    ("plan diffusers", 1, "text_encoder"),
    ("plan ggufs", 1, "GGUF"),
    ("plan empty", 1, "no config.json"),
    ("plan ./nowhere/at/all", 1, "no such folder"),
    ("inspect adapter", 1, "adapter"),
    ("eval M --base adapter", 1, "adapter"),
    ("bench M --dtype double", 2, "float32"),
    ("quantize M -o Q --format gguf", 2, "auto, compressed-tensors, native"),
]


MISTAKES = [  # what people type, exit code, and what they are told to type instead
    ("quantise M -o Q", 2, "did you mean quantize?"),
    ("evaluate M", 2, "did you mean eval?"),
    ("M -o Q", 2, "before it, say what to do with it: bench, card"),
    ("meta-llama/Llama-3.2-1B", 2, "before it, say what to do with it: bench, card"),
    ("--model M", 2, "begin with a command: bench, card"),
    ("help quantize", 2, "did you mean --help?"),
    ("quantize M -o Q two words", 2, "a name with spaces needs quotation marks"),
    ("quantize M -o Q --bits 5bit", 2, "is not one of 8, 4, 3, 2"),
    ("quantize M -o Q --bits 4bit --no-eval --format gguf", 2, "hf-quant convert --to gguf makes it of the result"),
    ("quantize M -o Q --method smoothquant", 2, "smoothquant+gptq"),
    ("quantize M -o Q --method awq,gptq", 2, "awq+gptq"),
    ("quantize M -o Q --method Auto-Round", 2, "did you mean learned?"),
    ("quantize M -o Q --method awq+learned", 2, "learned alone, or awq+gptq"),
    ("quantize M -o Q --max-kl 1%", 2, "write for example 0.02"),
    ("quantize M -o Q --base-dtype bf61", 2, "did you mean bf16?"),
    ("quantize M -o Q --override lm_head", 2, "write for example 'lm_head=W8A16-g128'"),
    ("convert M -o Q --to q4_k_m", 2, "quantize --scheme Q4_K makes one"),
    ("convert M -o Q", 2, "Add --to FORMAT: native, compressed-tensors"),
    ("plan M --target vLLM2", 2, "did you mean vllm?"),
    ("plan ggufs", 1, "hf-quant convert ggufs/model.gguf --to native -o FOLDER"),
    ("card M", 2, "say what to do with it: build, show, validate"),
    ("quantize M", 2, "Add -o FOLDER: Folder of the result"),
    ("quantize -o Q", 2, "a Hub id such as owner/name"),
    ("quantize M --output-dir Q", 2, "did you mean -o FOLDER?"),
    ("quantize M -o Q --wbits 4", 2, "did you mean --bits?"),
    ("quantize M -o Q --bnb_4bit_quant_type nf4", 2, "did you mean --scheme W4A16-g64?"),
    ("quantize M -o Q --token hf_x", 2, "did you mean HF_TOKEN=... before the command?"),
    ("convert M -o Q --outtype q8_0", 2, "did you mean --to gguf?"),
    ("quantize M -o Q --trust_remote_cod", 2, "did you mean --trust-remote-code?"),
    ("quantize M -o Q --scheme int4", 2, "did you mean W4A16-g128?"),
    ("quantize M -o Q --scheme w4a16", 2, "did you mean W4A16-g128?"),
    ("quantize M -o Q --scheme W4A16g128", 2, "did you mean W4A16-g128?"),
    ("quantize M -o Q --scheme 4bit", 2, "did you mean W4A16-g128?"),
    ("quantize M -o Q --scheme W8A16_g32_asym", 2, "did you mean W8A16-g32-asym?"),
    ("quantize M -o Q --scheme nf4", 2, "use W4A16-g64"),
    ("quantize M -o Q --scheme fp8", 2, "use W8A16-g128"),
    ("quantize M -o Q --scheme Q4_K_M", 2, "most of its layers are Q4_K, which is a scheme"),
    ("quantize M -o Q --scheme 5bit", 2, "the nearest scheme is W8A16-g128"),
    ("quantize M -o Q --scheme w4a4", 2, "or 8 in W8A8 and W4A8-g128"),
    ("quantize M -o Q --scheme gptq", 2, "say --method gptq"),
    ("quantize M -o Q --method gtpq", 2, "did you mean gptq?"),
    ("quantize M -o Q --method smoothqant+gptq", 2, "did you mean smoothquant?"),
    ("quantize M -o Q --format compresed_tensors", 2, "did you mean compressed-tensors?"),
    ("quantize M -o Q --format gptq", 2, "hf-quant convert --to gptq makes it of the result"),
    ("convert M -o Q --to compressed_tensor", 2, "did you mean compressed-tensors?"),
    ("quantize M -o Q --override *.down_proj=8bit", 2, "did you mean W8A16-g128?"),
    ("quantize M -o Q --dtype fp61", 2, "did you mean fp16?"),
    ("quantize M -o Q --dtype int4", 2, "for its weights there is --scheme"),
    ("quantize M -o Q --device gpu", 2, "did you mean cuda?"),
    ("quantize M -o Q --min-top1 95", 2, "write it with a percent sign"),
    ("quantize M -o Q --method gptq --max-memory 2KG", 2, "write for example 4GB"),
    ("quantize M -o Q --text M/heldut.txt", 1, "did you mean heldout.txt?"),
    ("quantize M -o M --overwrite", 1, "inputs are never replaced"),
    ("quantize M -o empty", 1, "--overwrite"),
    ("quantize models/lama -o Q", 1, "did you mean models/llama?"),
    ("quantize ./models/lama -o Q", 1, "did you mean models/llama?"),
    ("quantize model.gguf -o Q", 1, "hf-quant convert model.gguf --to native"),
    ("quantize adapter -o Q", 1, "hf_quant.merge_adapters(model) where the base is quantized"),
    ("push M name", 2, "write owner/name"),
    ("push M https://huggingface.co/owner/name", 2, "did you mean owner/name?"),
    ("report models/lama", 2, "did you mean models/llama?"),
    ("inspect ./nowhere", 1, "a Hub id such as owner/name"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Things that are no models, and some that might be."""
    home = tmp_path_factory.mktemp("folders")
    for name in (
        "M/config.json", "M/heldout.txt", "models/llama/config.json", "adapter/adapter_config.json",
        "diffusers/model_index.json", "diffusers/text_encoder/config.json", "ggufs/model.gguf", "model.gguf",
        "model.safetensors", "empty/x", "rows.parquet", "rows.jsonl.gz",
    ):  # fmt: skip
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("{}")
    return home


@pytest.fixture(scope="module")
def answers(folders: Path) -> dict[str, Any]:
    """For each command line: exit code, message, seconds of the processor, and whether torch was imported."""
    calls = [call for call, _, _ in [*CASES, *MISTAKES]]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps([call.split() for call in calls]), cwd=folders,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return dict(zip(calls, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(("call", "code", "said"), [*CASES, *MISTAKES])
def test_a_mistake_is_answered_before_torch_is_imported(
    call: str, code: int, said: str, answers: dict[str, Any]
) -> None:
    exit_code, message, seconds, imported = answers[call]
    assert exit_code == code and said in " ".join(message.split()) and "Traceback" not in message, message
    assert not imported and seconds < 1


@pytest.mark.parametrize("call", [["quantise", "M"], ["quantize", "M", "-o", "Q", "--format", "gptq"]])
def test_a_mistake_takes_less_than_a_second(call: list[str], folders: Path) -> None:
    """Of the processor, as a process of its own, so that other work on this machine does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "hf_quant.cli", *call], cwd=folders, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize(
    ("value", "bytes_"),
    [("4GB", 4_000_000_000), ("2GiB", 2**31), ("4G", 4_000_000_000), ("4k", 4000), ("1.5 MB", 1_500_000), ("17", 17)],
)
def test_sizes(value: str, bytes_: int) -> None:
    from hf_quant.cli._types import Size

    assert Size().convert(value, None, None) == bytes_


@pytest.mark.parametrize(("value", "share"), [("1%", 0.01), ("0.01", 0.01), ("100%", 1.0), ("150%", 1.5)])
def test_shares(value: str, share: float) -> None:
    from hf_quant.cli._types import Share

    assert Share().convert(value, None, None) == pytest.approx(share)


@pytest.mark.parametrize(
    ("value", "name"), [("fp16", "float16"), ("bf16", "bfloat16"), ("Compressed_Tensors", "compressed-tensors")]
)
def test_names_may_be_spelled_in_more_than_one_way(value: str, name: str) -> None:
    from hf_quant.cli._types import DTYPE, SAVED

    assert (SAVED if "Tensors" in value else DTYPE).convert(value, None, None) == name
