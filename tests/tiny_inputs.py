"""Arguments for ``forward`` of a tiny model: random tokens, pixels, sounds, and whatever else it cannot run without."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 256
GRID = (1, 4, 4)  # frames, and patches of an image in each direction


def inputs_of(model: Any, batch: int = 2, tokens: int = 12) -> dict[str, Any]:
    """Arguments that ``model.forward`` runs with; the first ones that were tried, if it runs with none."""
    usual = _usual(model, batch, tokens)
    for change in CHANGES:
        given = change(model, usual)
        try:
            with torch.no_grad():
                model(**given)
        except Exception:  # of any type: the model's own code
            continue
        return given
    return usual


def _usual(model: Any, batch: int, tokens: int) -> dict[str, Any]:
    """Random tokens, pixels or sounds, as the signature and the main input of the model say."""
    random = torch.Generator().manual_seed(0)
    config, takes = model.config, inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    given: dict[str, Any] = {}
    ids = _tokens(config, batch, tokens, random)
    if "input_ids" in takes:
        given["input_ids"] = ids
    if "decoder_input_ids" in takes and "ForSequenceClass" not in type(model).__name__:
        given["decoder_input_ids"] = ids[:, : tokens // 2].clone()
    scaled = hasattr(model, "logit_scale") or hasattr(model, "temperature")
    contrastive = getattr(config, "text_config", None) is not None and scaled
    if "pixel_values" in takes and (main == "pixel_values" or "input_ids" not in takes or contrastive):
        given["pixel_values"] = _pixels(config, batch, random)
    if "input_features" in takes and main == "input_features":
        given["input_features"] = _features(config, batch, random)
    if main == "input_values" or ("input_values" in takes and "input_ids" not in takes):
        spectrogram = config.model_type == "audio-spectrogram-transformer"
        shape = (batch, config.max_length, config.num_mel_bins) if spectrogram else (batch, 4000)
        given["input_values"] = torch.randn(shape, generator=random)
    if "use_cache" in takes:
        given["use_cache"] = False
    for name, parameter in takes.items():
        wanted = parameter.default is inspect.Parameter.empty or name in ASKED_FOR
        if name in MORE and name not in given and wanted:
            given[name] = MORE[name](config, batch, tokens, random)
    if "grid_thw" in given or "image_grid_thw" in given:
        given["hidden_states" if "hidden_states" in takes else "pixel_values"] = _patches(config, batch, random)
    return given


def _tokens(config: Any, batch: int, tokens: int, random: torch.Generator) -> Tensor:
    vocabulary = vocabulary_of(config)
    low = 20 if vocabulary > 20 else 0  # above most special tokens
    ids = torch.randint(low, min(vocabulary, 140), (batch, tokens), generator=random)
    if isinstance(end := getattr(config, "eos_token_id", None), int) and 0 <= end < vocabulary:
        ids[:, -1] = end  # where some classifiers look
    return ids


def vocabulary_of(config: Any) -> int:
    """Size of the vocabulary; that of other models for a model without one."""
    sizes = (getattr(config.get_text_config(), "vocab_size", None), getattr(config, "vocab_size", None))
    return next((size for size in sizes if isinstance(size, int) and size), VOCABULARY)


def _pixels(config: Any, batch: int, random: torch.Generator) -> Tensor:
    config = getattr(config, "vision_config", None) or config
    size = getattr(config, "image_size", None) or getattr(config, "input_size", None) or 32
    height, width = (size if isinstance(size, list | tuple) else (size, size))[:2]
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None)
    return torch.randn(batch, channels if isinstance(channels, int) else 3, height, width, generator=random)


def _features(config: Any, batch: int, random: torch.Generator) -> Tensor:
    sound = getattr(config, "audio_config", None) or config
    bins = getattr(sound, "num_mel_bins", None) or getattr(sound, "feature_size", None) or 16
    kind = config.model_type
    if getattr(getattr(config, "encoder_config", None) or sound, "subsampling_factor", None):
        return torch.randn(batch, 64, bins, generator=random)
    if kind.startswith("wav2vec2_bert") or "seamless" in kind or kind in ("speech_to_text", "lasr_ctc"):
        width = getattr(config, "feature_projection_input_dim", None) or getattr(
            config, "input_feat_per_channel", bins
        )
        return torch.randn(batch, 40, width, generator=random)
    return torch.randn(batch, bins, 2 * (getattr(sound, "max_source_positions", None) or 32), generator=random)


def _patches(config: Any, batch: int, random: torch.Generator) -> Tensor:
    """The flattened patches of all images, ``[B * frames * rows * columns, pixels]``."""
    frames, rows, columns = GRID
    channels = getattr(config, "in_channels", None) or getattr(config, "num_channels", None) or 3
    pixels = channels * (getattr(config, "temporal_patch_size", None) or 1) * config.patch_size**2
    return torch.randn(batch * frames * rows * columns, pixels, generator=random)


def _video(config: Any, batch: int, _tokens: int, random: torch.Generator) -> Tensor:
    """Frames ``[B, F, C, H, W]``."""
    config = getattr(config, "vision_config", None) or config
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None) or 4
    return _pixels(config, batch * frames, random).unflatten(0, (batch, frames))


def _boxes(_config: Any, batch: int, tokens: int, random: torch.Generator) -> Tensor:
    """Corners of words on a page, each behind the one before."""
    corners = torch.randint(0, 50, (batch, tokens, 2), generator=random)
    return torch.cat([corners, corners + torch.randint(1, 50, (batch, tokens, 2), generator=random)], dim=-1)


def _series(config: Any, batch: int, _tokens: int, random: torch.Generator) -> Tensor:
    """Values of a time series, ``[B, T]`` or, with channels, ``[B, T, C]``."""
    length = getattr(config, "context_length", None) or 32
    lags = getattr(config, "lags_sequence", None)
    channels = getattr(config, "num_input_channels", None)
    shape = (batch, length + (max(lags) if lags else 0), *((channels,) if channels else ()))
    return torch.randn(shape, generator=random)


def _of_series(width: str) -> Callable[..., Tensor]:
    """Something at each time of a series, as wide as a field of the configuration."""
    return lambda config, batch, tokens, random: torch.ones(
        *_series(config, batch, tokens, random).shape[:2], getattr(config, width, None) or 0
    )


MORE: dict[str, Callable[[Any, int, int, torch.Generator], Any]] = {
    "grid_thw": lambda _config, batch, _tokens, _random: torch.tensor([GRID] * batch),
    "image_grid_thw": lambda _config, batch, _tokens, _random: torch.tensor([GRID] * batch),
    "merge_sizes": lambda _config, batch, _tokens, _random: torch.ones(batch, dtype=torch.long),
    "pixel_values_videos": _video,
    "bbox": _boxes,
    "past_values": _series,
    "past_time_features": _of_series("num_time_features"),
    "past_observed_mask": lambda *given: torch.ones_like(_series(*given)),
    "qformer_input_ids": lambda config, batch, tokens, random: _tokens(config, batch, tokens, random),
    "query_embeds": lambda config, batch, tokens, random: torch.randn(batch, 4, config.hidden_size, generator=random),
    "inputs_embeds": lambda config, batch, tokens, random: torch.randn(
        batch, tokens, config.hidden_size, generator=random
    ),
    "input_features_mask": lambda config, batch, tokens, random: torch.ones(
        batch, _features(config, batch, random).shape[-1], dtype=torch.long
    ),
}
ASKED_FOR = ("bbox",)  # without a default in the signature, but asked for in the code


def _with(name: str, make: Callable[[Any, int, int, torch.Generator], Any]) -> Callable[..., dict[str, Any]]:
    """Changes arguments: one more, or one of another shape."""

    def changed(model: Any, given: dict[str, Any]) -> dict[str, Any]:
        if name not in inspect.signature(model.forward).parameters:
            return given
        batch, tokens = given["input_ids"].shape if "input_ids" in given else (2, 12)
        return given | {name: make(model.config, batch, tokens, torch.Generator().manual_seed(0))}

    return changed


def _mono(_config: Any, batch: int, _tokens: int, random: torch.Generator) -> Tensor:
    return torch.randn(batch, 1, 4000, generator=random)


def _codebooks(config: Any, batch: int, tokens: int, random: torch.Generator) -> Tensor:
    """A row of tokens for each codebook of each sequence."""
    return _tokens(config, batch * (getattr(config, "num_codebooks", None) or 1), tokens, random)


def _patch_images(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Patches as small images ``[N, C, H, W]`` in place of rows."""
    size = getattr(model.config, "patch_size", None)
    rows = given.get("pixel_values", given.get("hidden_states"))
    if "grid_thw" not in given or not isinstance(rows, Tensor) or not isinstance(size, int):
        return given
    name = "pixel_values" if "pixel_values" in given else "hidden_states"
    return given | {name: rows.view(len(rows), -1, size, size)}


def _patches_of_images(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """All patches of each image in a row, ``[B, P, pixels]``, with its rows and columns, as images of any size are given."""
    takes = inspect.signature(model.forward).parameters
    config = getattr(model.config, "vision_config", None) or model.config
    if not {"spatial_shapes", "pixel_attention_mask"} <= takes.keys():
        return given
    side, random = GRID[1], torch.Generator().manual_seed(0)
    return given | {
        "pixel_values": torch.randn(2, side * side, 3 * config.patch_size**2, generator=random),
        "pixel_attention_mask": torch.ones(2, side * side, dtype=torch.long),
        "spatial_shapes": torch.tensor([[side, side]] * 2),
    }


CHANGES = (
    lambda _model, given: given,
    _with("pixel_values", lambda config, batch, _tokens, random: _pixels(config, batch, random)),
    _with("pixel_values", _video),
    _with("input_values", _mono),
    _with("input_ids", _codebooks),
    _with("input_features_mask", MORE["input_features_mask"]),
    _patch_images,
    _patches_of_images,
    _with("input_features", lambda config, batch, _tokens, random: _features(config, batch, random)),
)
