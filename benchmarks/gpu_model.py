"""A Llama of the shapes of 7B, with random weights, on a GPU: rounded while it loads, then prompts and decoding beside bf16.

    python benchmarks/gpu_model.py [--rows FILE] [--folder FOLDER]
    python benchmarks/gpu_model.py --dry-run

Seconds to load, memory, seconds for a prompt, and tokens a second of decoding: one step after the other as ``generate`` makes
them, and as one CUDA graph that is replayed. A cell that does not fit into memory is named as such.
"""

import gc
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _gpu import Rows, device_for, gigabytes, parser, reset_peak, seconds, wait
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from hf_quant import HfQuantConfig
from hf_quant.core.scheme import QuantScheme

SEVEN_BILLION = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "num_attention_heads": 32,
                 "vocab_size": 32000, "max_position_embeddings": 4096}  # fmt: skip
TINY = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256, "num_attention_heads": 4,
        "vocab_size": 512, "max_position_embeddings": 256}  # fmt: skip
MODELS = ("bf16", "W4A16-g128", "W8A16-g128", "W4A8-g128", "W8A8", "W3A16-g128-asym", "W2A16-g64-asym")
CELLS = ((1, 128), (1, 2048), (8, 128), (64, 128), (8, 2048))  # batch, tokens of the prompt
NEW = 32


def make(folder: Path, shapes: dict[str, int], device: torch.device, layers: int | None = None) -> Path:
    """A folder with a Llama of random bf16 weights; one that is there already stays."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        config = LlamaConfig(**{**shapes, "num_hidden_layers": layers or shapes["num_hidden_layers"]})
        config.dtype = torch.bfloat16
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return folder


def load(folder: Path, name: str, device: torch.device, **more: Any) -> Any:
    config = {} if name == "bf16" else {"quantization_config": HfQuantConfig(str(QuantScheme.parse(name)), **more)}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=str(device), **config).eval()


def speed(model: Any, batch: int, prompt: int, new: int, device: torch.device) -> dict[str, Any]:
    """Of one cell; the graph last, since it may fail where the rest does not."""
    reset_peak(device)
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=device)
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "use_cache": True}
    first = seconds(partial(model.generate, ids, max_new_tokens=1, min_new_tokens=1, **how), device)
    written: list[torch.Tensor] = []
    whole = seconds(
        lambda: written.append(model.generate(ids, max_new_tokens=new, min_new_tokens=new, **how)), device, repeats=1
    )
    found: dict[str, Any] = {"prompt_seconds": first, "decode": batch * (new - 1) / (whole - first)}
    try:
        took, tokens = _stepwise(model, ids, new, device)
        same = (tokens[:, : new - 1] == written[-1][:, prompt : prompt + new - 1]).float().mean()
        found |= {"decode_graph": batch / took, "same_tokens": float(same)}
    except Exception as error:  # of any type: a graph is a matter of transformers and PyTorch, too
        found["graph_failed"] = f"{type(error).__name__}: {str(error)[:200]}"
    return found | gigabytes(device)


def _stepwise(model: Any, ids: torch.Tensor, new: int, device: torch.device) -> tuple[float, torch.Tensor]:
    """Seconds of one step of decoding with a static cache, replayed as a CUDA graph, and the tokens; on a CPU without a graph."""
    batch, prompt = ids.shape
    length = prompt + new + 8
    cache = StaticCache(config=model.config, max_cache_len=length)
    token = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
    position = torch.full((batch, 1), prompt, device=device)
    places, written = torch.arange(length, device=device), torch.zeros(batch, length, dtype=torch.long, device=device)

    def step() -> None:
        written.index_copy_(1, position[0], token)
        mask = (places <= position[:1])[None, None].expand(batch, 1, 1, length)
        logits = model(token, position_ids=position, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))
        position.add_(1)

    if device.type != "cuda":
        return seconds(step, device, repeats=new), written[:, prompt:]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return seconds(graph.replay, device, repeats=new), written[:, prompt:]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, help="Where the model lies, or is made.")
    options.add_argument("--models", nargs="*", default=MODELS)
    arguments = options.parse_args()
    rows, device = Rows("model", arguments.rows), device_for(arguments.dry_run)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="hf-quant-gpu-"))
    start = time.perf_counter()
    make(folder, TINY if arguments.dry_run else SEVEN_BILLION, device)
    rows.add(made=str(folder.name), seconds=time.perf_counter() - start)
    cells = ((1, 8), (2, 8)) if arguments.dry_run else CELLS
    for name in arguments.models:
        reset_peak(device)
        wait(device)
        start = time.perf_counter()
        model = load(folder, name, device)
        wait(device)
        rows.add(model=name, load_seconds=time.perf_counter() - start, **gigabytes(device))
        with torch.inference_mode():
            for batch, prompt in cells:
                new = 4 if arguments.dry_run else NEW
                cell = {"model": name, "batch": batch, "prompt": prompt}
                rows.attempt(cell, partial(speed, model, batch, prompt, new, device))
        del model
        gc.collect()


if __name__ == "__main__":
    main()
