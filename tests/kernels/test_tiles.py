"""What is known of GPUs before anything runs on them: those that are too old, and tiles found on this machine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_quant.core.scheme import QuantScheme
from hf_quant.kernels import LinearSpec, _plugins, _say_slow, select
from hf_quant.kernels._shared import outliers
from hf_quant.kernels._triton import tiles
from hf_quant.kernels._triton.tiles import forget, key, tile_for, tuned, tuned_path

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As many GPUs as capabilities are given, as far as why_not asks."""

    def there_are(*capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: capabilities[i])
        clear()

    def clear() -> None:
        tiles.too_old.cache_clear()
        select.__globals__["_select"].cache_clear()

    yield there_are
    monkeypatch.undo()
    clear()


@pytest.mark.parametrize("slug", ["W4A16-g128", "W8A8", "W4A16-g32-nf4"])
def test_a_gpu_that_is_too_old_dequantizes(
    slug: str, gpus: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    spec = LinearSpec(QuantScheme.parse(slug), 256, 256, torch.float16, "cuda")
    name = "triton_int8" if slug == "W8A8" else "triton_wna16"
    backend = _plugins.load("kernels", name).BACKEND()
    gpus((8, 0), (9, 0))
    assert backend.why_not(spec) is None and type(select(spec)).__name__ == type(backend).__name__
    assert not caplog.messages
    for capabilities in (((7, 5),), ((8, 0), (7, 0))):  # a T4; a V100 beside something newer
        gpus(*capabilities)
        reason = backend.why_not(spec) or ""
        assert reason.startswith("needs compute capability 8.0, cuda:") and reason.endswith(
            ".".join(map(str, capabilities[-1]))
        )
        _say_slow.cache_clear()
        caplog.clear()
        for _ in range(2):
            chosen = select(spec)
        assert sum("slower" in message and reason in message for message in caplog.messages) == 1
        assert type(getattr(chosen, "inner", chosen)).__name__ in ("Dequant", "Codebook")
        assert not outliers._on_gpu(torch.empty(1, device="meta").to(torch.float16))


GOOD = {"tiles": {"8": [8, 64, 2, 4, 0], "64": [64, 64, 4, 2]}, "dense": 64}


@pytest.mark.parametrize(
    "content",
    [
        "[]", "5", "{", "null", '{"W4 512x512": 5}', '{"W4 512x512": {}}', '{"W4 512x512": {"tiles": {}, "dense": 64}}',
        *(json.dumps({"W4 512x512": GOOD | change}) for change in (
            {"dense": "64"}, {"dense": None}, {"tiles": []}, {"tiles": {"x": [8, 64, 2, 4]}}, {"tiles": {"8": [8, 64]}},
            {"tiles": {"8": {"block_m": 8}}}, {"tiles": {"8": [8, 64, 2, "4"]}}, {"tiles": {"8": [7, 64, 2, 4]}},
            {"tiles": {"8": [8, 0, 2, 4]}}, {"tiles": {"8": [8, 64, 2, 4, 3]}}, {"tiles": {"8": [8, 64, 2, 400]}},
        )),
    ],
)  # fmt: skip
def test_a_file_of_tuned_tiles_of_another_shape(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    path = tuned_path(CPU)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    forget()
    assert tuned(CPU) == {} and tile_for(CPU, 4, 8, 512, 512, 8) is not None
    path.write_text(json.dumps({"W4 512x512": GOOD, "W4 1x1": 5}))
    forget()
    assert key(4, 512, 512) in tuned(CPU)
    found = tile_for(CPU, 4, 8, 512, 512, 8)
    assert found is not None and found.block_m == 8
    forget()


def test_the_cache_of_tiles_is_bounded() -> None:
    forget()
    for m in range(1, 6000):
        tile_for(CPU, 4, m, 512, 512, 8)
    assert tile_for.cache_info().currsize <= 4096
    forget()
