"""One peer quantizes one model, in the peer's own environment; `calibrated.py` calls this and never imports a peer.

    PYTHON-OF-THE-PEER benchmarks/calibrated_peers.py quantize RECIPE MODEL CALIBRATION BITS GROUP_SIZE OUT
    PYTHON-OF-THE-PEER benchmarks/calibrated_peers.py dequantize RECIPE MODEL OUT PLAIN

The first saves what the peer saves in OUT and prints what it cost. The second turns it into a plain float32 checkpoint:
weights by the peer's own dequantizer, from the scales as they are stored, beside the tensors that stayed in floating point.
Needs torch, transformers, safetensors and the peer; nothing of hf_quant.
"""

import importlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]
EVERY = 0.002  # seconds between two looks at the memory


def anonymous_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


class Watch:
    """Seconds, on the clock and of the CPU, and peak anonymous memory between `__enter__` and `__exit__`."""

    def __enter__(self) -> "Watch":
        self.first = self.peak = anonymous_mb()
        self.done, self.thread = threading.Event(), threading.Thread(target=self._look, daemon=True)
        self.load, self.start, self.cpu = os.getloadavg()[0], time.perf_counter(), time.process_time()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu = time.perf_counter() - self.start, time.process_time() - self.cpu
        self.done.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.done.wait(EVERY):
            self.peak = max(self.peak, anonymous_mb())

    def to_dict(self) -> dict[str, Any]:
        """Memory in MB: anonymous at the peak and after the imports, resident at the peak of the process."""
        return {
            "seconds": self.seconds, "cpu_seconds": self.cpu, "peak_mb": self.peak, "imports_mb": self.first,
            "max_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "threads": torch.get_num_threads(), "load_before": self.load,
        }  # fmt: skip


def layers(folder: Path) -> Weights:
    """The weights that everybody quantizes, ``[N, K]``: all linear layers of the decoder's blocks."""
    return {
        name.removesuffix(".weight"): turned(name, tensor)
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if tensor.ndim == 2 and (".layers." in name or ".h." in name)
    }


def turned(name: str, weight: Tensor) -> Tensor:
    """``[N, K]`` from what a checkpoint holds, or the reverse: GPT-2, whose blocks are called ``h``, stores ``[K, N]``."""
    return weight.T.contiguous() if ".h." in name else weight


def stored(folder: Path) -> Weights:
    return {name: tensor for file in sorted(folder.rglob("*.safetensors")) for name, tensor in load_file(file).items()}


def save(folder: Path, tensors: Weights) -> None:
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def bits_per_weight(tensors: Weights, weights: Weights) -> float:
    """Of the layers, as stored: codes, scales and zero points; not ``g_idx``, which is trivial or can be folded away."""
    left_out = ("g_idx", "bias", "weight_shape")
    size = sum(
        8 * tensor.nbytes
        for name, tensor in tensors.items()
        if any(name.startswith(f"{layer}.") for layer in weights) and not name.endswith(left_out)
    )
    return size / sum(weight.numel() for weight in weights.values())


def columns_of(layer: Any, k: int) -> Tensor:
    """The weight ``[N, K]`` that a layer applies, read off the identity; in float32, exact."""
    return layer(torch.eye(k)).T.contiguous()


# --- peers: each returns after saving to ``out``; `dequantize_...` reads that folder back ------------------------------


def gptqmodel(model: Path, ids: Tensor, out: Path, config: Any) -> None:
    from gptqmodel import GPTQModel

    made = GPTQModel.load(str(model), config, device="cpu")
    made.quantize([{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids], batch_size=1)
    made.save(str(out))


def gptq(**how: Any) -> Callable[..., None]:
    def run(model: Path, ids: Tensor, bits: int, group_size: int, out: Path) -> None:
        from gptqmodel import QuantizeConfig

        gptqmodel(model, ids, out, QuantizeConfig(bits=bits, group_size=group_size, **how))

    return run


def gptq_foem(model: Path, ids: Tensor, bits: int, group_size: int, out: Path) -> None:
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.config import FOEMConfig

    config = QuantizeConfig(bits=bits, group_size=group_size, mse=2.4, foem=FOEMConfig(alpha=0.25, beta=0.2))
    gptqmodel(model, ids, out, config)


def awq(**how: Any) -> Callable[..., None]:
    def run(model: Path, ids: Tensor, bits: int, group_size: int, out: Path) -> None:
        from gptqmodel.quantization.config import AWQConfig

        gptqmodel(model, ids, out, AWQConfig(bits=bits, group_size=group_size, **how))

    return run


def dequantize_gptq(out: Path) -> Weights:
    from gptqmodel import BACKEND, GPTQModel

    made = GPTQModel.load(str(out), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
    tensors, weights = stored(out), {}
    for name, module in made.model.named_modules():
        if f"{name}.qweight" in tensors:
            module.scales.data = tensors[f"{name}.scales"].float()
            weights[name] = module.dequantize_weight().T
    return weights


def dequantize_awq(out: Path) -> Weights:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    config, tensors, weights = json.loads((out / "quantize_config.json").read_text()), stored(out), {}
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        codes, zeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
        weights[name] = dequantize_gemm(codes, zeros, scales.float(), config["bits"], config["group_size"]).T
    return weights


def autoround(**how: Any) -> Callable[..., None]:
    def run(model: Path, ids: Tensor, bits: int, group_size: int, out: Path) -> None:
        from auto_round import AutoRound

        AutoRound(
            str(model), bits=bits, group_size=group_size, dataset=list(ids.split(8)), nsamples=len(ids),
            seqlen=ids.shape[1], device_map="cpu", **how,
        ).quantize_and_save(output_dir=str(out), format="auto_round")  # fmt: skip

    return run


def dequantize_autoround(out: Path) -> Weights:
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear  # zero points are stored less one

    config = json.loads(next(out.rglob("quantization_config.json")).read_text())
    if config["packing_format"] != "auto_round:auto_gptq":
        raise ValueError(f"packing_format {config['packing_format']!r}")
    tensors, weights = stored(out), {}
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        codes, scales = tensors[f"{name}.qweight"], tensors[f"{name}.scales"]
        k = codes.shape[0] * 32 // config["bits"]
        layer = QuantLinear(config["bits"], config["group_size"], k, codes.shape[1], bias=False)
        layer.qweight, layer.qzeros, layer.scales = codes, tensors[f"{name}.qzeros"], scales.float()
        weights[name] = columns_of(layer, k)
    return weights


def hqq(**how: Any) -> Callable[..., None]:
    def run(model: Path, _: Tensor, bits: int, group_size: int, out: Path) -> None:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
        from hqq.models.hf.base import AutoHQQHFModel
        from transformers import AutoModelForCausalLM

        made = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        config = BaseQuantizeConfig(nbits=bits, group_size=group_size, **how)
        AutoHQQHFModel.quantize_model(made, config, compute_dtype=torch.float16, device="cpu")
        found = {n: m.state_dict() for n, m in made.named_modules() if isinstance(m, HQQLinear)}
        save(out, {f"{name}.{key}": tensor for name, state in found.items() for key, tensor in state.items()})

    return run


def dequantize_hqq(out: Path) -> Weights:
    from hqq.core.quantize import HQQLinear

    tensors, weights = stored(out), {}
    for name in [name.removesuffix(".W_q") for name in tensors if name.endswith(".W_q")]:
        layer = HQQLinear(None, None, compute_dtype=torch.float16, device="cpu", initialize=False)
        layer.load_state_dict({k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")})
        weights[name] = layer.dequantize().float()
    return weights


def nf4(block: int) -> Callable[..., None]:
    def run(model: Path, _: Tensor, bits: int, group_size: int, out: Path) -> None:
        from bitsandbytes.functional import quantize_4bit

        if bits != 4:
            raise ValueError("NF4 has 4 bits only")
        tensors = {}
        for name, weight in layers(model).items():
            codes, state = quantize_4bit(weight, blocksize=block, quant_type="nf4")
            tensors |= {
                f"{name}.weight": codes,
                **{f"{name}.weight.{k}": v for k, v in state.as_dict(packed=True).items()},
            }
        save(out, tensors)

    return run


def dequantize_nf4(out: Path) -> Weights:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    tensors, weights = stored(out), {}
    for name in [name for name in tensors if name.endswith(".weight")]:
        state = {k: v for k, v in tensors.items() if k.startswith(f"{name}.")}
        found = QuantState.from_dict(state, device="cpu")
        found.dtype = torch.float32
        weights[name.removesuffix(".weight")] = dequantize_4bit(tensors[name], found)
    return weights


class Peer(NamedTuple):
    """How to run a row, how to read it back, the package it needs, and whether it is that package's default."""

    run: Callable[..., None]
    dequantize: Callable[[Path], Weights]
    package: str
    default: bool = True


PEERS = {
    "gptqmodel-gptq": Peer(gptq(), dequantize_gptq, "gptqmodel"),
    "gptqmodel-gptq-mse": Peer(gptq(mse=2.4), dequantize_gptq, "gptqmodel", False),
    "gptqmodel-gptq-mse-asym": Peer(gptq(mse=2.4, sym=False), dequantize_gptq, "gptqmodel", False),
    "gptqmodel-gptq-mse-desc_act": Peer(gptq(mse=2.4, desc_act=True), dequantize_gptq, "gptqmodel", False),
    "gptqmodel-gptq-mse-foem": Peer(gptq_foem, dequantize_gptq, "gptqmodel", False),
    "gptqmodel-awq": Peer(awq(), dequantize_awq, "gptqmodel"),
    "gptqmodel-awq-asym": Peer(awq(sym=False), dequantize_awq, "gptqmodel", False),
    "autoround": Peer(autoround(), dequantize_autoround, "auto-round"),
    "autoround-best": Peer(autoround(iters=1000, enable_alg_ext=True), dequantize_autoround, "auto-round", False),
    "hqq": Peer(hqq(), dequantize_hqq, "hqq"),
    "hqq-axis0": Peer(hqq(axis=0), dequantize_hqq, "hqq", False),
    "nf4": Peer(nf4(64), dequantize_nf4, "bitsandbytes"),
    "nf4-128": Peer(nf4(128), dequantize_nf4, "bitsandbytes", False),
}


def quantize(recipe: str, model: Path, calibration: Path, bits: int, group_size: int, out: Path) -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401  (what everybody imports is not counted)

    peer = PEERS[recipe]
    importlib.import_module(peer.package.replace("-", "_"))
    ids = load_file(calibration)["ids"]
    with Watch() as watch:
        peer.run(model, ids, bits, group_size, out)
    versions = {name: version(name) for name in (peer.package, "torch", "transformers")}
    print(json.dumps(watch.to_dict() | {"versions": versions}))


def dequantize(recipe: str, model: Path, out: Path, plain: Path) -> None:
    original, kept = layers(model), stored(out)
    weights = {name: weight.float() for name, weight in PEERS[recipe].dequantize(out).items()}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if shapes != {name: tuple(weight.shape) for name, weight in original.items()}:
        raise ValueError(f"{recipe} quantized other layers: {sorted(set(shapes) ^ set(original))}")
    rest = {name: kept.get(name, tensor).float() for name, tensor in stored(model).items()}
    save(plain, rest | {f"{name}.weight": turned(name, weight) for name, weight in weights.items()})
    config = json.loads((model / "config.json").read_text()) | {"dtype": "float32"}
    (plain / "config.json").write_text(json.dumps(config))
    print(json.dumps({"bits_per_weight": bits_per_weight(kept, original)}))


def main(mode: str, recipe: str, model: str, *rest: str) -> None:
    if mode == "quantize":
        calibration, bits, group_size, out = rest
        quantize(recipe, Path(model), Path(calibration), int(bits), int(group_size), Path(out))
    else:
        out, plain = rest
        dequantize(recipe, Path(model), Path(out), Path(plain))


if __name__ == "__main__":
    main(*sys.argv[1:])
