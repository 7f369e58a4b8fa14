"""Which predictions of batches of inputs count, what is compared of models that predict none, and what identifies a sample."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from hf_quant.data.batches import hashes_of
from hf_quant.data.held_out import HeldOut
from hf_quant.errors import HfQuantError
from hf_quant.evaluation.encoders import base_outputs, evaluate_encoder, sample_passages
from hf_quant.evaluation.results import Quality
from hf_quant.evaluation.samples import predictions, samples

TEXT = SimpleNamespace(image_token_id=9, video_token_index=8, audio_token_id=None)
DECODER = SimpleNamespace(is_encoder_decoder=True)
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_placeholders_and_padding_are_not_predicted() -> None:
    ids = torch.tensor([[9, 9, 3, 4, 8, 5], [0, 0, 9, 6, 7, 2]])
    scored, target = predictions({}, {"input_ids": ids}, TEXT)
    assert target.tolist() == [3, 4, 5, 0, 6, 7, 2] and not scored[:, -1].any()
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]])  # padding on the right, and on the left
    scored, target = predictions({}, {"input_ids": ids, "attention_mask": mask}, TEXT)
    assert target.tolist() == [3, 4, 6, 7, 2]
    assert scored.nonzero().tolist() == [[0, 1], [0, 2], [1, 2], [1, 3], [1, 4]]


def test_a_decoder_predicts_its_labels_or_the_tokens_that_follow() -> None:
    given = torch.tensor([[1, 3, 4], [1, 5, 0]])
    batch = {"labels": torch.tensor([[3, 4, 2], [5, 2, -100]])}
    scored, target = predictions(batch, {"decoder_input_ids": given}, DECODER)
    assert target.tolist() == [3, 4, 2, 5, 2] and scored.tolist() == [[True] * 3, [True, True, False]]
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    scored, target = predictions({}, {"decoder_input_ids": given, "decoder_attention_mask": mask}, DECODER)
    assert target.tolist() == [3, 4, 5] and scored.tolist() == [[True, True, False], [True, False, False]]


def test_what_a_decoder_needs() -> None:
    config = tf.T5Config(
        vocab_size=64, d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model, ids = tf.T5ForConditionalGeneration(config), torch.ones(2, 4).long()
    with pytest.raises(HfQuantError, match=r"inputs to measure on: .* no labels or decoder_input_ids"):
        samples(model, [{"input_ids": ids}])
    with pytest.raises(HfQuantError, match="label 64 is outside of the vocabulary of 64"):
        samples(model, [{"input_ids": ids, "labels": ids + 63 * (torch.arange(4) > 2)}])
    assert len(samples(model, [{"input_ids": ids, "labels": ids}] * 3).sources.unique()) == 6


def measured(model: Any, batches: list[dict[str, Tensor]], by: float = 0.2) -> Quality:
    """A copy whose weights are a little off, beside the model."""
    torch.manual_seed(1)
    model, other = model.eval(), copy.deepcopy(model).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0)
    read = sample_passages(model, batches)
    base = base_outputs(lambda dtype: copy.deepcopy(model).to(dtype), read, torch.float32)
    same = evaluate_encoder(model, base, read)
    assert all(estimate.value == pytest.approx(1, abs=1e-9) for estimate in same.metrics.values())
    return evaluate_encoder(other, base, read)


def images(count: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, 32, 32)}


@pytest.mark.parametrize(("kind", "config", "batch", "names"), [
    (tf.ViTModel, tf.ViTConfig(**SMALL, image_size=32, patch_size=16), images(3), ["embedding_cosine"]),
    (tf.ViTMAEModel, tf.ViTMAEConfig(**SMALL, image_size=32, patch_size=8), images(3), ["embedding_cosine"]),
    (tf.ConvNextForImageClassification, tf.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, num_labels=5),
     images(3), ["embedding_cosine", "logits_cosine", "top1"]),
    (tf.SegformerForSemanticSegmentation,
     tf.SegformerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, num_labels=5),
     images(3), ["embedding_cosine", "logits_cosine", "top1"]),
    (tf.Wav2Vec2ForCTC, tf.Wav2Vec2Config(**SMALL, vocab_size=12, conv_dim=[8] * 7, num_conv_pos_embedding_groups=2),
     {"input_values": torch.randn(3, 2000)}, ["embedding_cosine", "logits_cosine", "top1"]),
    (tf.CLIPModel, tf.CLIPConfig(text_config=SMALL | {"vocab_size": 64}, vision_config=SMALL | {"image_size": 32, "patch_size": 16}),
     images(3) | {"input_ids": torch.randint(3, 60, (3, 5))}, ["embedding_cosine"]),
    (tf.BartForSequenceClassification,
     tf.BartConfig(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
                   encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=16),
     {"input_ids": torch.tensor([[5, 6, 7, 8, 2]] * 3)}, ["embedding_cosine", "logits_cosine", "top1"]),
    (tf.BartModel,
     tf.BartConfig(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
                   encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=16),
     {"input_ids": torch.tensor([[5, 6, 7, 8, 2]] * 3)}, ["embedding_cosine"]),
])  # fmt: skip
def test_what_is_compared(kind: Any, config: Any, batch: dict[str, Tensor], names: list[str]) -> None:
    torch.manual_seed(0)
    quality = measured(kind(config), [batch, {name: tensor[:2] for name, tensor in batch.items()}])
    assert list(quality.metrics) == names and quality.documents == 5 and quality.inputs == sorted(batch)
    assert quality.metrics["embedding_cosine"].value < 1 - 1e-6
    if "top1" in names:
        assert 0 <= quality.metrics["top1"].value <= 1
    assert quality.tokens == (25 if "input_ids" in batch else 5)


def test_padding_does_not_count_in_embeddings() -> None:
    torch.manual_seed(0)
    model = tf.BertModel(tf.BertConfig(**SMALL, vocab_size=64, initializer_range=0.3))
    ids = torch.randint(3, 60, (1, 6))
    padded = {"input_ids": torch.cat([ids, ids[:, :3]], 1), "attention_mask": torch.tensor([[1] * 6 + [0] * 3])}
    short = {"input_ids": ids, "attention_mask": torch.ones(1, 6).long()}
    values = [measured(model, [batch]).metrics["embedding_cosine"].value for batch in (short, padded)]
    assert values[0] == pytest.approx(values[1], abs=1e-6) and values[0] < 1 - 1e-6


def test_overlap_is_found_however_samples_are_grouped() -> None:
    pictures, ids = torch.randn(6, 3, 4, 4), torch.randint(9, (6, 5))
    together = hashes_of([{"pixel_values": pictures, "input_ids": ids}])
    assert together == hashes_of([{"pixel_values": pictures[i : i + 2]} for i in (4, 0, 2)]) and len(together) == 6
    HeldOut.of_inputs([{"pixel_values": torch.randn(2, 3, 4, 4)}]).refuse_overlap(together)
    with pytest.raises(
        HfQuantError,
        match=r"1 of 2 samples of the inputs to measure on also occur in the calibration or training data",
    ):
        HeldOut.of_inputs([{"pixel_values": pictures[3:4]}, {"pixel_values": torch.ones(1, 3, 4, 4)}]).refuse_overlap(
            together
        )
    mask = torch.ones_like(ids)
    longer = {"input_ids": torch.cat([ids, ids * 0], 1), "attention_mask": torch.cat([mask, mask * 0], 1)}
    assert hashes_of([longer]) == hashes_of([{"input_ids": ids}]), "padding identifies nothing"
    patches, grid = torch.randn(12, 8), torch.tensor([[1, 2, 2], [1, 2, 4]])
    both = hashes_of([{"pixel_values": patches, "image_grid_thw": grid}])
    assert set(hashes_of([{"pixel_values": patches[:4], "image_grid_thw": grid[:1]}])) < set(both) and len(both) == 2


def test_ids_alone_in_a_file_may_have_any_name(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    save_file({"ids": torch.ones(3, 4).long()}, tmp_path / "ids.safetensors")
    assert [list(batch) for batch in HeldOut.of_inputs(tmp_path / "ids.safetensors").batches] == [["input_ids"]] * 3
    save_file({"images": torch.ones(3, 4)}, tmp_path / "images.safetensors")
    with pytest.raises(HfQuantError, match=r"images\.safetensors: images .* no input of a model by its name"):
        HeldOut.of_inputs(tmp_path / "images.safetensors")
    save_file({"pixel_values": torch.ones(0, 4)}, tmp_path / "empty.safetensors")
    with pytest.raises(HfQuantError, match=r"empty\.safetensors: .*pixel_values \[0, 4\] is empty"):
        HeldOut.of_inputs(tmp_path / "empty.safetensors")
    (tmp_path / "bad.safetensors").write_text("no tensors")
    with pytest.raises(HfQuantError, match=r"bad\.safetensors"):
        HeldOut.of_inputs(tmp_path / "bad.safetensors")
