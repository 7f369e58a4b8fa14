"""Batches of model inputs for calibration: what is wrong with one is said before anything runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BatchFeature

from hf_quant.data.batches import are_batches, checked_batches
from hf_quant.data.calibration import Calibration, calibration
from hf_quant.errors import HfQuantError, UnchainedError
from hf_quant.hf.batch_inputs import fitting
from hf_quant.hf.blocks import Around
from hf_quant.solve.hidden_parts import HiddenParts
from hf_quant.solve.ranks import ALONE

PIXELS = torch.ones(2, 3, 4, 4)


class Sees(nn.Module):
    main_input_name = "pixel_values"

    def forward(self, pixel_values: Tensor | None = None, pixel_mask: Tensor | None = None) -> None: ...


class Writes(nn.Module):
    main_input_name = "input_features"

    def forward(self, input_features: Tensor | None = None, decoder_input_ids: Tensor | None = None) -> None: ...


def test_what_are_batches() -> None:
    for text in (None, "file.txt", Path("x"), torch.ones(2, 2), ["a text"], []):
        assert not are_batches(text)
    assert are_batches([{"pixel_values": PIXELS}]) and are_batches(iter([{}])) and are_batches((BatchFeature({}),))


def test_batches_of_a_processor() -> None:
    given = [
        BatchFeature({"pixel_values": np.ones((2, 3, 4, 4)), "pixel_mask": None}),
        {"pixel_values": PIXELS.half()},
    ]
    batches = checked_batches(iter(given))
    assert [batch["pixel_values"].dtype for batch in batches] == [torch.float32] * 2
    data = Calibration.of_batches(given)
    assert data.to_dict()["inputs"] == ["pixel_values"] and data.sha256 == calibration(given, None, 1, 1, 1).sha256
    assert data.sha256 != Calibration.of_batches([given[0], {"pixel_values": 2 * PIXELS}]).sha256


@pytest.mark.parametrize(("batches", "message"), [
    ([{"pixel_values": PIXELS}], "1 batch is too little"),
    ([{"pixel_values": PIXELS}, {"pixel_values": PIXELS, "pixel_mask": PIXELS}], "batch 1 has pixel_mask, pixel_values, and the first"),
    ([{"pixel_values": PIXELS}, {"pixel_values": PIXELS / 0}], "batch 1: pixel_values has NaN or infinite"),
    ([{"pixel_values": [object()]}], "batch 0: pixel_values is list, not a tensor"),
    ([{"pixel_values": PIXELS[:0]}], r"batch 0: pixel_values \[0, 3, 4, 4\] is empty"),
    ([{"pixel_values": PIXELS, "pixel_mask": torch.ones(3, 4)}], r"batch 0: pixel_mask \[3, 4\] and pixel_values .* first axis"),
    ([{}], "batch 0 is empty"),
    ([PIXELS.tolist()], "batch 0 is list, not a mapping"),
])  # fmt: skip
def test_what_is_wrong_is_said(batches: list[Any], message: str) -> None:
    with pytest.raises(HfQuantError, match=message):
        checked_batches(batches)


def test_what_a_model_does_not_take_or_needs() -> None:
    config, sound = (
        SimpleNamespace(is_encoder_decoder=True, decoder_start_token_id=7),
        {"input_features": torch.ones(1, 2, 2)},
    )
    with pytest.raises(HfQuantError, match=r"Sees takes no input_features .*it takes pixel_values, pixel_mask"):
        fitting(Sees, config, [{"pixel_values": PIXELS} | sound], 9)
    with pytest.raises(HfQuantError, match="no pixel_values, which Sees needs"):
        fitting(Sees, config, [{"pixel_mask": PIXELS}], 9)
    with pytest.raises(HfQuantError, match="no decoder_input_ids, which Writes needs"):
        fitting(Writes, config, [sound], 9)
    (given,) = fitting(Writes, config, [sound | {"labels": torch.tensor([[3, 4, -100]])}], 9)
    assert given["decoder_input_ids"].tolist() == [[7, 3, 4]] and "labels" not in given
    with pytest.raises(HfQuantError, match="decoder_input_ids: token id 9 is outside of the vocabulary of 9"):
        fitting(Writes, config, [sound | {"decoder_input_ids": torch.tensor([[9]])}], 9)


def test_inputs_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "inputs.safetensors"
    save_file({"pixel_values": torch.rand(5, 3, 4, 4), "pixel_mask": torch.ones(5, 4, 4)}, file)
    assert [len(batch["pixel_mask"]) for batch in calibration(file, None, 1, 1, 1).batches] == [2, 2, 1]
    save_file({"pixel_values": torch.rand(5, 3, 4, 4), "pixel_mask": torch.ones(4, 4, 4)}, file)
    with pytest.raises(HfQuantError, match="must have one first axis"):
        calibration(file, None, 1, 1, 1)


class Tower(nn.Module):
    """Two chains, of which the second takes what the first block of the first one has returned."""

    def __init__(self, kept: int = 8) -> None:
        super().__init__()
        self.layers, self.last = nn.ModuleList([layer(), layer()]), nn.ModuleList([layer()])
        self.length, self.config = kept, SimpleNamespace()

    def forward(self, pixel_values: Tensor) -> Tensor:
        first = self.layers[0](pixel_values)
        second = self.layers[1](first)
        if second.shape[1] != self.length:
            raise ValueError("another length")
        return self.last[0](second.mean(1, keepdim=True) + first)  # type: ignore[no-any-return]


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4))


def around(model: Tower, batches: list[dict[str, Tensor]]) -> Around:
    blocks = dict(zip(["layers.0", "layers.1", "last.0"], [*model.layers, *model.last], strict=True))
    return Around(model, blocks, torch.zeros(0, 0), ALONE, batches)


def test_a_later_chain_takes_what_a_block_inside_of_the_one_before_returned() -> None:
    model, batches = Tower(), [{"pixel_values": torch.rand(size, 8, 4)} for size in (2, 1)]
    made = around(model, batches)
    with torch.inference_mode():
        made.find_chains()
        assert made.chains == [["layers.0", "layers.1"], ["last.0"]] and made.kept == {"layers.0"}
        outputs = [(torch.rand(size, 8, 4), torch.rand(size, 8, 4)) for size in (2, 1)]
        kept, last = (HiddenParts.of(parts, {}, {}, None) for parts in zip(*outputs, strict=True))
        (states,), _ = made.enter(made.chains[1], [{"layers.0": kept, "layers.1": last}], [None])
    for number, (first, second) in enumerate(outputs):
        torch.testing.assert_close(states[number], second.mean(1, keepdim=True) + first)


def test_blocks_that_change_the_shape_are_calibrated_as_a_whole_model() -> None:
    with pytest.raises(UnchainedError, match="Tower: blocks that return their input end in: another length"):
        around(Tower(kept=4), [{"pixel_values": torch.rand(1, 8, 4)}] * 2).find_chains()
