"""Rounding beside calibration on small models of several kinds, trained here for some seconds on structured synthetic data.

    python benchmarks/calibrated_kinds.py [--steps N] [--models N]

Each model is quantized by ``rtn`` and by ``calibrated`` at W4 and W3 in groups of 32, in memory and from its shards, whose tensors
must be equal bit for bit. The error is the relative distance of the logits from those of the float model on held-out inputs. It is the mean over several
models of a kind, trained from different random weights: in one of them a single input on the edge of two classes can outweigh all.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.utils import logging as hf_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _results import write

from hf_quant import HfQuantConfig
from hf_quant.bench.machine import cpu_name
from hf_quant.data.calibration import Calibration
from hf_quant.hf.calibrate_shards import Settings, quantize_streaming
from tests.architectures import differing
from tests.tiny_models import relative, run

SCHEMES = ("W4A16-g32", "W3A16-g32")
CLASSES, BATCH, BATCHES = 8, 16, 8
IMAGE = 127  # the token that stands for a patch, or for a piece of sound
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
Inputs = dict[str, Tensor]
Draw = Callable[[torch.Generator], tuple[Inputs, Tensor]]


def gratings(random: torch.Generator) -> tuple[Inputs, Tensor]:
    """Images of stripes whose angle is the class."""
    labels = torch.randint(CLASSES, (BATCH,), generator=random)
    axis = torch.arange(32) / 32
    angle = (labels / CLASSES * torch.pi)[:, None, None]
    phase = torch.rand(BATCH, 1, 1, generator=random) * 6
    waves = torch.sin(25 * (angle.cos() * axis[:, None] + angle.sin() * axis[None]) + phase)
    noise = torch.randn(BATCH, 3, 32, 32, generator=random)
    return {"pixel_values": waves[:, None] * torch.tensor([1.0, 0.5, -1.0])[:, None, None] + 0.3 * noise}, labels


def tones(random: torch.Generator) -> tuple[Inputs, Tensor]:
    """Spectrograms of a rising tone whose height is the class."""
    labels = torch.randint(CLASSES, (BATCH,), generator=random)
    time, height = torch.arange(64), torch.arange(16)
    centre = 2 * labels[:, None] + (time / 32)[None]
    spectrum = (-((height - centre[..., None]) ** 2)).exp()
    return {"input_values": spectrum + 0.2 * torch.randn(BATCH, 64, 16, generator=random)}, labels


def sentences(random: torch.Generator) -> tuple[Inputs, Tensor]:
    """Token ids among which one of a set of words, at any place, is the class."""
    labels = torch.randint(CLASSES, (BATCH,), generator=random)
    ids = torch.randint(20, 120, (BATCH, 24), generator=random)
    ids[torch.arange(BATCH), torch.randint(24, (BATCH,), generator=random)] = labels + 3
    return {"input_ids": ids}, labels


def endings(random: torch.Generator) -> tuple[Inputs, Tensor]:
    """Sentences whose last words tell the class, for models that read from left to right and forget."""
    labels = torch.randint(CLASSES, (BATCH,), generator=random)
    ids = torch.randint(20, 120, (BATCH, 24), generator=random)
    ids[torch.arange(BATCH), torch.randint(20, 24, (BATCH,), generator=random)] = labels + 3
    return {"input_ids": ids}, labels


def spoken(random: torch.Generator) -> tuple[Inputs, Tensor]:
    """Tones for an encoder, whose decoder says the class first."""
    inputs, labels = tones(random)
    first = torch.ones(BATCH, 1, dtype=torch.int64)
    return {"input_features": inputs["input_values"].mT.contiguous(), "decoder_input_ids": first}, labels


def heard(random: torch.Generator) -> tuple[Inputs, Tensor]:
    """Tones before a question; the first word of the answer is the class."""
    inputs, labels = tones(random)
    words = torch.randint(20, 120, (BATCH, 4), generator=random)
    return {
        "input_features": inputs["input_values"].mT.contiguous(),
        "feature_attention_mask": torch.ones(BATCH, 64, dtype=torch.int64),
        "input_ids": torch.cat([torch.full((BATCH, 16), IMAGE), words], dim=1),
    }, labels


def sources(random: torch.Generator) -> tuple[Inputs, Tensor]:
    """Sentences for an encoder, whose decoder says the class first."""
    inputs, labels = sentences(random)
    return inputs | {"decoder_input_ids": torch.zeros(BATCH, 1, dtype=torch.int64)}, labels


def pictures(random: torch.Generator) -> tuple[Inputs, Tensor]:
    """Stripes before a question; the first word of the answer is the class."""
    inputs, labels = gratings(random)
    words = torch.randint(20, 120, (BATCH, 4), generator=random)
    return inputs | {"input_ids": torch.cat([torch.full((BATCH, 16), IMAGE), words], dim=1)}, labels


def answer(logits: Tensor) -> Tensor:
    """The logits of the classes: of a head, or of the last token."""
    return logits if logits.ndim == 2 else logits[:, -1, :CLASSES]


KINDS: dict[str, tuple[Callable[[], Any], Draw]] = {
    "vision classifier (ViT)": (
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**SMALL, image_size=32, patch_size=8, num_labels=CLASSES)),
        gratings,
    ),
    "convolutional classifier (ResNet)": (
        lambda: tf.ResNetForImageClassification(
            tf.ResNetConfig(embedding_size=32, hidden_sizes=[64, 128], depths=[2, 2], num_labels=CLASSES)
        ),
        gratings,
    ),
    "audio classifier (AST)": (
        lambda: tf.ASTForAudioClassification(
            tf.ASTConfig(**SMALL, max_length=64, num_mel_bins=16, patch_size=8, time_stride=8, frequency_stride=8,
                         num_labels=CLASSES)
        ),
        tones,
    ),
    "encoder, classification head (BERT)": (
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**SMALL, vocab_size=128, num_labels=CLASSES)),
        sentences,
    ),
    "decoder, reward head (Llama)": (
        lambda: tf.LlamaForSequenceClassification(
            tf.LlamaConfig(**SMALL, vocab_size=128, num_labels=CLASSES, pad_token_id=0)
        ),
        sentences,
    ),
    "recurrent (Mamba)": (
        lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=128, hidden_size=64, state_size=16, num_hidden_layers=2)),
        endings,
    ),
    "hybrid, linear attention (Qwen3-Next)": (
        lambda: tf.Qwen3NextForCausalLM(
            tf.Qwen3NextConfig(
                vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2,
                linear_key_head_dim=16, linear_value_head_dim=16, mlp_only_layers=[0, 1, 2, 3],
            )
        ),
        sentences,
    ),
    "encoder-decoder (T5)": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0)
        ),
        sources,
    ),
    "vision-language (LLaVA)": (
        lambda: tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(
                vision_config=tf.CLIPVisionConfig(**SMALL, image_size=32, patch_size=8),
                text_config=tf.LlamaConfig(**SMALL, vocab_size=128), image_token_index=IMAGE,
            )
        ),
        pictures,
    ),
    "audio encoder, text decoder (Whisper)": (
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(
                vocab_size=128, num_mel_bins=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, d_model=64, max_source_positions=32,
                max_target_positions=16, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )
        ),
        spoken,
    ),
    "audio-language (Qwen2-Audio)": (
        lambda: tf.Qwen2AudioForConditionalGeneration(
            tf.Qwen2AudioConfig(
                audio_config={
                    "d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128,
                    "num_mel_bins": 16, "max_source_positions": 32,
                },
                text_config=tf.Qwen2Config(**SMALL, num_key_value_heads=2, vocab_size=128).to_dict(),
                audio_token_index=IMAGE,
            )
        ),
        heard,
    ),
}  # fmt: skip


def fit(model: Any, draw: Draw, steps: int) -> float:
    """Train in place; the share of held-out inputs that are classified right."""
    random, optimizer = torch.Generator().manual_seed(1), torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(steps):
        inputs, labels = draw(random)
        loss = cross_entropy(answer(model(**inputs).logits), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    inputs, labels = held_out(draw)
    return float((answer(run(model, inputs)).argmax(-1) == labels).float().mean())


def held_out(draw: Draw) -> tuple[Inputs, Tensor]:
    random = torch.Generator().manual_seed(3)
    drawn = [draw(random) for _ in range(16)]
    names = drawn[0][0]
    return {name: torch.cat([inputs[name] for inputs, _ in drawn]) for name in names}, torch.cat([y for _, y in drawn])


def measure(name: str, steps: int, seed: int = 0) -> list[dict[str, Any]]:
    """Train one model, and quantize it by both methods in each scheme."""
    build, draw = KINDS[name]
    torch.manual_seed(seed)
    model = build()
    right, kind, random = fit(model, draw, steps), type(model), torch.Generator().manual_seed(2)
    batches, inputs = [draw(random)[0] for _ in range(BATCHES)], held_out(draw)[0]
    expected, rows = answer(run(model, inputs)), []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "float"
        model.save_pretrained(base)
        for scheme in SCHEMES:
            rounded = kind.from_pretrained(base, quantization_config=HfQuantConfig(scheme)).eval()
            config = HfQuantConfig(scheme, method="calibrated", calibration=batches)
            calibrated = kind.from_pretrained(base, quantization_config=config).eval()
            stage = Path(folder) / scheme
            stage.mkdir()
            quantize_streaming(
                base, HfQuantConfig(scheme, method="calibrated"), Calibration.of_batches(batches),
                Path(folder) / f"{scheme}.work", stage, Settings(lambda _line: None),
            )  # fmt: skip
            rows.append({
                "kind": name, "accuracy": right, "scheme": scheme, "rtn": relative(answer(run(rounded, inputs)), expected),
                "calibrated": relative(answer(run(calibrated, inputs)), expected),
                "equal bytes": not differing(calibrated, kind.from_pretrained(stage)),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def of_models(name: str, steps: int, models: int) -> list[tuple[dict[str, Any], ...]]:
    """For each scheme, the rows of all models."""
    return list(zip(*(measure(name, steps, seed) for seed in range(models)), strict=True))


def mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row for all models; the errors of each stay beside it."""
    averages = {what: sum(row[what] for row in rows) / len(rows) for what in ("accuracy", "rtn", "calibrated")}
    single = [[row["rtn"], row["calibrated"]] for row in rows]
    return rows[0] | averages | {"equal bytes": all(row["equal bytes"] for row in rows), "models": single}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--models", type=int, default=3, help="of each kind")
    options = parser.parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = [mean(rows) for name in KINDS for rows in of_models(name, options.steps, options.models)]
    where = f"{cpu_name()}, torch {torch.__version__}, transformers {version('transformers')}, {date.today()}"
    lines = [
        "# Rounding and calibration by kinds of models", "",
        "Relative error of the logits on 256 held-out inputs; made by `benchmarks/calibrated_kinds.py`, "
        f"{options.steps} steps, mean of {options.models} models; {where}.",
        "", "| model | right | scheme | rtn | calibrated | memory and shards equal |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        lines.append(
            f"| {row['kind']} | {row['accuracy']:.0%} | {row['scheme']} | {row['rtn']:.4f} | {row['calibrated']:.4f} | "
            f"{'yes' if row['equal bytes'] else 'no'} |"
        )
    write("calibrated_kinds", {"cpu": cpu_name(), "where": where, "rows": rows}, "\n".join(lines))


if __name__ == "__main__":
    main()
