"""Memory and time to load, each model in a separate process, so that memory of an earlier one is not counted."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from hf_quant.errors import HfQuantError

TOKENS = 128  # of the prompt that is run once; fewer where the model has fewer positions
EVERY = 0.002  # seconds between two samples
STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory and time to load of one model.

    Attributes:
        load_seconds: Duration of ``from_pretrained``, whether or not the files are in the page cache.
        weight_bytes: Size of all parameters and buffers in memory.
        peak_bytes: Peak use while loading and running 128 tokens, above that of the process before: device memory if there is a
            device, else resident memory of the process.
        where: ``"process"`` or the device's name.
    """

    load_seconds: float
    weight_bytes: int
    peak_bytes: int
    where: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(model: str, **load: Any) -> Memory:
    """Load and run ``model`` once in a fresh process.

    Args:
        model: Folder or Hub id.
        load: For ``from_pretrained``: plain values only (``dtype``, ``device_map``, ``revision``).

    Raises:
        HfQuantError: The process failed; the message is its last line.
    """
    call = [sys.executable, "-m", "hf_quant.bench.memory", json.dumps([model, load])]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HfQuantError(f"{model} could not be loaded: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


class _Watch(threading.Thread):
    """Records the peak memory of the process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.peak = _used()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(EVERY):
            self.peak = max(self.peak, _used())

    def stop(self) -> int:
        """Bytes above the use at the start."""
        self.done.set()
        self.join()
        return max(self.peak, _used()) - self.first


def _used() -> int:
    """Bytes of resident memory; where that cannot be read, its peak so far."""
    if STATUS.exists():
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(fields["VmRSS"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _main(model: str, load: dict[str, Any]) -> None:
    import torch
    from transformers import logging

    from hf_quant.hf import load as load_model
    from hf_quant.hf.auto import class_of, config_of, hub_options, positions_of, vocabulary_of

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    hub = hub_options(load)
    class_of(config_of(model, **hub), **hub)  # imports code of the checkpoint before measuring starts
    watch = _Watch()
    watch.start()
    start = time.perf_counter()
    loaded = load_model(model, **load)
    seconds = time.perf_counter() - start
    device, tokens = loaded.device, min(TOKENS, positions_of(loaded) or TOKENS)
    with torch.inference_mode():
        loaded(torch.arange(tokens, device=device)[None] % vocabulary_of(loaded.config))
    peak = watch.stop()
    if device.type != "cpu":
        peak = torch.get_device_module(device).max_memory_allocated(device)
    record = Memory(seconds, weight_bytes(loaded), peak, "process" if device.type == "cpu" else str(device))
    sys.stdout.write(json.dumps(record.to_dict()) + "\n")


def weight_bytes(model: Any) -> int:
    """Bytes of parameters, buffers and repacked codes, without counting any memory twice."""
    return sum(dict(map(_stored, _tensors(model))).values())


def _stored(tensor: Any) -> tuple[int, int]:
    """Address and bytes of a tensor; tensors in oneDNN's layout have no storage."""
    if tensor.is_mkldnn:
        return id(tensor), tensor.nbytes
    return tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()


def _tensors(model: Any) -> list[Any]:
    """Parameters, buffers and repacked codes."""
    from hf_quant.kernels import prepared_tensors

    laid_out = [prepared for module in model.modules() for prepared in getattr(module, "_repacked", {}).values()]
    return [*model.parameters(), *model.buffers(), *chain.from_iterable(map(prepared_tensors, laid_out))]


if __name__ == "__main__":
    _name, _load = json.loads(sys.argv[1])
    _main(_name, _load)
