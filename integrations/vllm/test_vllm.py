"""Quantized checkpoints served by vLLM: greedy tokens are those of transformers."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from integrations.conftest import REFERENCE, cell, of_ours, record

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: integrations/try vllm")
adapter = pytest.importorskip("hf_quant_vllm", reason="pip install integrations/vllm")
pytest.importorskip("hf_quant_vllm.linear")  # what vLLM warns of on import is no error here
from hf_quant_vllm import arriving
from hf_quant_vllm import config as settings
from safetensors.torch import load_file
from vllm.config import VllmConfig as HostConfig
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers import linear as layers

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip

from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from hf_quant import HfQuantConfig, HfQuantError, convert

LENGTH = 32
ATTENTION = ("q_proj", "k_proj", "v_proj")
TOKENIZER = AutoTokenizer.from_pretrained(REFERENCE)
TEXTS = [text.strip() for text in (REFERENCE / "heldout.txt").read_text().split("<|endoftext|>")]
PROMPTS = [TOKENIZER(text[:200]).input_ids[:24] for text in TEXTS[:8]]
MIXED = {"overrides": {"*q_proj": "W3A16-g64", "*.down_proj": "W8A16-g128", "*.v_proj": None}}
# schemes, and fields of HfQuantConfig besides
NATIVE: list[tuple[str, dict[str, Any]]] = [
    ("W2A16-g32-asym", {}),
    ("W3A16-g128", {}),
    ("W3A16-g128-o0.1%", {}),
    ("W4A16-g128-asym", {}),
    ("W4A16-g128-o0.5%-columns", {}),
    ("W8A16-g128", {}),
    ("W8A8", {}),
    ("W8A8-o0.5%-columns", {"method": "gptq", "calibration_tokens": 1024}),
    ("W8A8-o0.5%-columns", {"method": "calibrated", "calibration_tokens": 1024}),
    ("W4A8-g128", {}),
    ("W4A16-g64", MIXED),
    ("W4A16-g128", {}),
]
FIELDS = dict(NATIVE)
NO_KERNEL = "Failed to find a kernel that can implement the WNA16 linear layer"
# what stock vLLM 0.32 does with other formats on CPUs: None if it serves them, or a part of its refusal
STOCK = {
    ("W4A16-g128", "compressed-tensors"): None,
    ("W4A16-g128-asym", "compressed-tensors"): None,
    ("W8A8", "compressed-tensors"): None,
    ("W4A8-g128", "compressed-tensors"): None,
    ("W8A16-g128", "compressed-tensors"): NO_KERNEL,
    ("W3A16-g128", "compressed-tensors"): NO_KERNEL,
    ("W2A16-g32-asym", "compressed-tensors"): NO_KERNEL,
    ("W4A16-g128", "gptq"): None,
    ("W4A16-g128-asym", "gptq"): "Unsupported quantization config: bits=4, sym=False",
    ("W8A16-g128", "gptq"): "Marlin does not support weight_bits = uint8b128",
    ("W3A16-g128", "gptq"): "Unsupported quantization config: bits=3, sym=True",
    ("W2A16-g32-asym", "gptq"): "Unsupported quantization config: bits=2, sym=False",
    ("W4A16-g128", "awq"): None,
    ("W4A16-g128-asym", "awq"): None,
    ("W4A16-g64", "compressed-tensors"): "vLLM requires all to use the same scheme",
    ("W4A16-g64", "gptq"): "All shards of fused layers to have the same precision",
}
FORMATS = ("compressed-tensors", "gptq", "awq")
NOT_WRITTEN = [(scheme, to) for scheme in FIELDS for to in FORMATS if (scheme, to) not in STOCK]


Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """``made("W4A16-g128", "gptq", **fields)`` is a folder with the reference model; fields are those of HfQuantConfig."""

    def folder(scheme: str, to: str = "native", source: Path = REFERENCE, **fields: Any) -> Path:
        out = tmp_path_factory.mktemp("made") / to
        saves = to if to in ("native", "compressed-tensors") else "native"
        config = HfQuantConfig(scheme, format=saves, **fields)
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(out.with_name(saves))
        TOKENIZER.save_pretrained(out.with_name(saves))
        if saves != to:
            convert(out.with_name(saves), out, to=to)
        return out

    return folder


class Answer(NamedTuple):
    """A greedy continuation of vLLM, and of each of its tokens the log-probabilities of the 20 likeliest ones there."""

    tokens: list[int]
    logs: list[dict[int, float]]


class Agreement(NamedTuple):
    """How near the answers of two hosts are; log-probabilities in nats."""

    equal: int  # continuations that are the same to the last token
    tie: float  # the largest gap in transformers between the two tokens in which continuations part
    hosts: float  # how much the hosts differ, where tokens are equal, about the gap of the two likeliest: at most
    mean: float  # and in the mean
    dtype: float  # the same mean for transformers in the given dtype and in float32

    def __str__(self) -> str:
        if self.equal == len(PROMPTS):
            return f"{self.equal} of {len(PROMPTS)} equal"
        return (
            f"{self.equal} of {len(PROMPTS)} equal, the others to a tie of {self.tie:.2g} nats "
            f"(hosts differ by up to {self.hosts:.2g} elsewhere)"
        )


def served(folder: Path, dtype: str = "float32", prompts: list[list[int]] = PROMPTS, **options: Any) -> list[Answer]:
    """What vLLM answers."""
    host = vllm.LLM(
        model=str(folder), dtype=dtype, max_model_len=128, enforce_eager=True, max_num_seqs=8,
        max_num_batched_tokens=256,  # vLLM begins with a step of so many
        **({"distributed_executor_backend": "uni"} | options),
    )  # fmt: skip
    try:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=20)
        made = host.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        answers = (one.outputs[0] for one in made)
        return [
            Answer(list(one.token_ids), [{token: log.logprob for token, log in at.items()} for at in one.logprobs])
            for one in answers
        ]
    finally:
        host.llm_engine.engine_core.shutdown()
        del host
        gc.collect()


def expected(folder: Path, dtype: torch.dtype = torch.float32) -> list[list[int]]:
    """Those of transformers, with kernels of ours."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert of_ours(model)
    tokens = []
    for ids in map(torch.tensor, PROMPTS):
        options = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "do_sample": False}
        made = model.generate(ids[None], attention_mask=torch.ones_like(ids[None]), **options)
        tokens.append(made[0, len(ids) :].tolist())
    return tokens


@torch.no_grad()
def logs_of(folder: Path, dtype: torch.dtype, rows: list[list[int]]) -> list[Tensor]:
    """Transformers' log-probabilities after each token of each row."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return [model(torch.tensor([row])).logits[0].float().log_softmax(-1) for row in rows]


def compared(folder: Path, got: list[Answer], dtype: torch.dtype = torch.float32) -> Agreement:
    """Hold vLLM's answers against transformers': the tokens, and where they part, whether it is a tie."""
    wanted = expected(folder, dtype)
    pairs = list(zip(got, wanted, strict=True))
    ends = [next((at for at in range(LENGTH) if one.tokens[at] != other[at]), LENGTH) for one, other in pairs]
    rows = [ids + other[:end] for ids, (_, other), end in zip(PROMPTS, pairs, ends, strict=True)]
    ties, hosts, dtypes = [0.0], [0.0], [0.0]
    exact = logs_of(folder, torch.float32, rows)
    for ids, (one, other), end, logs, real in zip(
        PROMPTS, pairs, ends, logs_of(folder, dtype, rows), exact, strict=True
    ):
        for at in range(min(end + 1, LENGTH)):
            here, there = logs[len(ids) - 1 + at], real[len(ids) - 1 + at]
            if at == end:
                ties.append(float((here[one.tokens[at]] - here[other[at]]).abs()))
                continue
            first, second = here.topk(2).indices.tolist()
            gap = float(here[first] - here[second])
            hosts.append(abs(gap - (one.logs[at][first] - one.logs[at][second])))
            dtypes.append(abs(gap - float(there[first] - there[second])))
    equal = sum(end == LENGTH for end in ends)
    return Agreement(equal, max(ties), max(hosts), sum(hosts) / len(hosts), sum(dtypes) / len(dtypes))


@pytest.mark.parametrize(("scheme", "fields"), NATIVE)
def test_native(scheme: str, fields: dict[str, Any], made: Made) -> None:
    """The same tokens; where activations are rounded to INT8, continuations may part in a tie, one of eight at most."""
    folder = made(scheme, **fields)
    found = compared(folder, served(folder))
    record(f"native {scheme} {fields or ''}", **found._asdict())
    rounded = "A8" in scheme
    assert found.equal >= len(PROMPTS) - rounded
    assert found.tie <= found.hosts < (0.3 if rounded else 1e-3)
    how = f"{fields['method']}: " if "method" in fields else ""
    cell(named(scheme), "native", f"{how}served, {found}")


def named(scheme: str) -> str:
    """A scheme in the matrix of hosts."""
    return f"{scheme}, W3A16-g64, W8A16-g128, float" if FIELDS.get(scheme) is MIXED else scheme


@pytest.mark.parametrize(("scheme", "to"), STOCK)
def test_other_formats(scheme: str, to: str, made: Made) -> None:
    """Without the plug-in: what stock vLLM serves on this processor, in bfloat16, and in which words it refuses."""
    folder, refused = made(scheme, to, **FIELDS[scheme]), STOCK[scheme, to]
    if refused is None:
        found = compared(folder, served(folder, "bfloat16"), torch.bfloat16)
        record(f"{to} {scheme}", **found._asdict())
        assert found.tie <= found.hosts, "continuations part where the hosts' rounding decides"
        assert found.mean < 2 * found.dtype, "hosts differ no more than bfloat16 and float32 do"
        cell(named(scheme), to, f"served by stock vLLM in bfloat16, {found}")
    else:
        with pytest.raises(Exception, match=refused) as caught:
            served(folder, "bfloat16")
        record(f"{to} {scheme}", refused=" ".join(str(caught.value).split())[:300])
        cell(named(scheme), to, f'refused by stock vLLM: "{refused}"')


def test_int8_in_float32(made: Made) -> None:
    """Stock vLLM's INT8 products take activations in float32 too, where no rounding to bfloat16 decides."""
    folder = made("W8A8", "compressed-tensors")
    found = compared(folder, served(folder))
    record("compressed-tensors W8A8 in float32", **found._asdict())
    assert found.tie <= found.hosts < 0.3
    cell("W8A8", "compressed-tensors", f"in float32, {found}")


@pytest.mark.parametrize(("scheme", "to"), NOT_WRITTEN)
def test_what_a_format_cannot_hold_is_refused_before_a_host_sees_it(
    scheme: str, to: str, made: Made, tmp_path: Path
) -> None:
    with pytest.raises(HfQuantError) as caught:
        convert(made(scheme, **FIELDS[scheme]), tmp_path / to, to=to)
    record(f"{to} {scheme}", refused=str(caught.value))
    assert f"--to {to}: model.layers.0" in str(caught.value) and not (tmp_path / to).exists()
    cell(named(scheme), to, f"not written: {str(caught.value).rpartition(': ')[2]}")


def test_fused_and_stacked(made: Made, tmp_path: Path) -> None:
    """A mixture of experts with two widths, random weights, and an output head in 8 bits."""
    config = MixtralConfig(
        vocab_size=TOKENIZER.vocab_size, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, head_dim=32, max_position_embeddings=256,
        initializer_range=0.2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    overrides = {"*down_proj": "W3A16-g64-o1%", "lm_head": "W8A16-g128"}
    folder = made("W4A16-g32-asym", source=tmp_path, overrides=overrides, quantize_lm_head=True)
    found = compared(folder, served(folder))
    record("native, mixture of experts, W4A16-g32-asym and W3A16-g64-o1%, head W8A16-g128", **found._asdict())
    assert found.equal == len(PROMPTS)
    cell("W4A16-g32-asym, W3A16-g64-o1%, W8A16-g128 (experts, head)", "native", f"served, {found}")


@pytest.mark.parametrize("size", [2, 6])
def test_ranks_share_each_layer(size: int, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor parallelism, with vLLM's own layers for one rank after the other; with six ranks three share a head of keys."""
    fields = {"*.o_proj": "W3A16-g64-o1%", "*k_proj": "W8A16-g128", "*.down_proj": "W4A16-g64-o1%-columns"}
    scheme = "W3A16-g64-asym-o0.5%"
    folder, x = made(scheme, overrides=fields), torch.randn(5, 384)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    attention = model.model.layers[0].self_attn
    tensors = load_file(folder / "model.safetensors")
    config = settings.VllmConfig.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    monkeypatch.setattr(layers, "get_tensor_model_parallel_world_size", lambda: size)
    prefix = "model.layers.0.self_attn"
    given = {"quant_config": config, "bias": False, "params_dtype": torch.float32}
    wanted = {name: attention.get_submodule(name)(x).chunk(size if name == "q_proj" else 2, -1) for name in ATTENTION}
    summed = torch.zeros(5, 384)
    with set_current_vllm_config(HostConfig()), torch.no_grad():
        for rank in range(size):
            monkeypatch.setattr(layers, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
            fused = layers.QKVParallelLinear(384, 64, 6, 2, prefix=f"{prefix}.qkv_proj", **given)
            inner = layers.RowParallelLinear(384, 384, prefix=f"{prefix}.o_proj", **given)
            for name in (*ATTENTION, "o_proj"):
                for leaf in (leaf for leaf in arriving.NAMES if f"{prefix}.{name}.{leaf}" in tensors):
                    layer = inner if name == "o_proj" else fused
                    parameter, shard = layer.get_parameter(leaf), () if name == "o_proj" else (name[0],)
                    parameter.weight_loader(parameter, tensors[f"{prefix}.{name}.{leaf}"], *shard)
            for layer in (fused, inner):
                layer.quant_method.process_weights_after_loading(layer)
            part = rank * 2 // size
            expected_here = torch.cat([wanted["q_proj"][rank], wanted["k_proj"][part], wanted["v_proj"][part]], -1)
            torch.testing.assert_close(fused.quant_method.apply(fused, x), expected_here, rtol=1e-3, atol=1e-3)
            mine = x.chunk(size, -1)[rank].contiguous()
            summed += inner.quant_method.apply(inner, mine)
    torch.testing.assert_close(summed, attention.o_proj(x), rtol=1e-3, atol=1e-3)
    cell(f"{scheme}, W8A16-g128, W3A16-g64-o1%", "native", f"layers shared by {size} ranks")


def ranks(folder: Path) -> subprocess.CompletedProcess[str]:
    """Two ranks, in processes that are spawned and bound to no cores: left to itself vLLM wants a NUMA node for each."""
    options = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    options |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(folder), "2", str(LENGTH)]
    prompts, environment = json.dumps(PROMPTS), os.environ | options
    return subprocess.run(command, input=prompts, env=environment, capture_output=True, text=True)


def test_two_ranks_through_the_whole_engine(made: Made) -> None:
    scheme = "W3A16-g64-asym-o0.5%"
    folder = made(scheme)
    done = ranks(folder)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    answers = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))  # among vLLM's own
    equal = sum(one == other for one, other in zip(answers, expected(folder), strict=True))
    record(f"two ranks, native {scheme}", equal=f"{equal} of {len(PROMPTS)}")
    assert equal == len(PROMPTS)
    cell(scheme, "native", f"served by 2 ranks, {equal} of {len(PROMPTS)} equal")


def test_ranks_that_would_cut_groups_are_refused_by_the_whole_engine(made: Made) -> None:
    done = ranks(made("W4A16-g128"))
    assert done.returncode != 0
    assert "cuts the groups of 128 columns of W4A16-g128; 1 does not" in done.stdout + done.stderr


def test_another_version_of_the_host_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(vllm, "__version__", "0.40.0")
    monkeypatch.setattr(
        adapter.logger, "warning", lambda text, *words: lines.append(text % words)
    )  # vLLM hides others
    adapter.register()
    assert lines == ["hf-quant-vllm was tried with vLLM 0.32.x, and this is 0.40.0"]


def test_what_cannot_be_served_is_refused(made: Made) -> None:
    with pytest.raises(HfQuantError, match="the input embeddings are quantized"):
        served(made("W4A16-g128", quantize_lm_head=True))


@pytest.fixture
def server(made: Made, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = made("W3A16-g128-o0.1%")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--dtype", "float32", "--port", port,
        "--max-model-len", "128", "--enforce-eager", "--host", "127.0.0.1", "--served-model-name", "quantized",
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(600):
                time.sleep(1)
                assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                except OSError:
                    continue
                break
            yield f"http://127.0.0.1:{port}/v1/completions", folder
        finally:
            process.terminate()
            process.wait(60)


def test_the_server(server: tuple[str, Path]) -> None:
    url, folder = server
    body = {"model": "quantized", "prompt": PROMPTS, "max_tokens": LENGTH, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        choices = json.load(answer)["choices"]
    texts = [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])]
    equal = sum(text == TOKENIZER.decode(ids) for text, ids in zip(texts, expected(folder), strict=True))
    record("OpenAI-compatible server, native W3A16-g128-o0.1%", equal=f"{equal} of {len(PROMPTS)}")
    assert equal == len(PROMPTS)
    cell("W3A16-g128-o0.1%", "native", f"OpenAI-compatible server: {equal} of {len(PROMPTS)} equal")
