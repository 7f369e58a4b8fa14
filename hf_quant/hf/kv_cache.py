"""Keys and values in INT8 or INT4: a transformers cache that replaces the default one of a model.

INT8: symmetric, one scale for each token and head. INT4: as in KIVI (arXiv:2402.02750), keys by channel, since some channels are
large for all tokens, and values by token, both in groups with a zero point; the newest tokens stay in floating point.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import logging

from hf_quant.core.numerics import floored
from hf_quant.core.packing import pack, unpack
from hf_quant.errors import HfQuantError

KINDS = {"int8": 8, "int4": 4}
GROUP, RECENT = 32, 128  # tokens or channels that share a scale; newest tokens in floating point, for INT4
logger = logging.get_logger(__name__)


class QuantCache(Cache):
    """Pass a new one as ``past_key_values`` to ``model(...)`` or ``model.generate(...)`` (``cache`` since transformers 5.24).

    A model with an encoder and a decoder wants a pair: ``EncoderDecoderCache(QuantCache(config), QuantCache(config))``. One alone would
    mix the keys of the text that is written with those of the encoder, as a bare ``DynamicCache`` does too.

    Layers with a sliding window or another kind of state stay in floating point, with one message about it.

    Args:
        config: Configuration of the model.
        bits: 8 or 4.
        recent: With 4 bits, the number of newest tokens that stay in floating point.

    Raises:
        HfQuantError: ``bits`` is neither 8 nor 4, or ``recent`` is negative.
    """

    def __init__(self, config: PreTrainedConfig, bits: int = 8, *, recent: int = RECENT) -> None:
        if type(bits) is not int or type(recent) is not int or bits not in KINDS.values() or recent < 0:
            raise HfQuantError(
                f"a cache of keys and values has 8 or 4 bits and recent >= 0, got {bits!r} and {recent!r}"
            )
        layers = DynamicCache(config=config).layers or [DynamicLayer() for _ in range(config.num_hidden_layers)]  # type: ignore[no-untyped-call]
        plain = [type(layer) is DynamicLayer for layer in layers]
        cache_layers = [
            (Int8Layer() if bits == 8 else Int4Layer(recent)) if p else x for p, x in zip(plain, layers, strict=True)
        ]
        if not all(plain):
            kinds = ", ".join(sorted({type(x).__name__ for p, x in zip(plain, layers, strict=True) if not p}))
            logger.warning_once(f"the cache of {plain.count(False)} layers stays in floating point: {kinds}")
        super().__init__(layers=cache_layers)

    @property
    def nbytes(self) -> int:
        """Size of all tensors in the cache."""
        return cache_bytes(self)


def cache_bytes(cache: Any) -> int:
    """Size of a cache of transformers or of this module, in bytes."""
    return sum(t.nbytes for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor))


class _Layer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer. The tensors are ``[B, heads, ..., ...]``, and ``parts`` has their names."""

    parts: tuple[str, ...] = ()

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = torch.float32
        for name in self.parts:
            setattr(self, name, None)

    @property
    def keys(self) -> Tensor | None:
        """All of them in floating point, as models read those of an encoder; None before the first."""
        return self._whole("key") if self.get_seq_length() else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        """Transformers begins with None."""

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        return self._whole("value") if self.get_seq_length() else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        """As for `keys`."""

    def _whole(self, name: str) -> Tensor:
        """All of the ``"key"`` or ``"value"`` states in floating point ``[B, H, T, D]``."""
        raise NotImplementedError

    def _read(self) -> tuple[Tensor, Tensor]:
        return self._whole("key"), self._whole("value")

    def _real(self, codes: Tensor, scale: Tensor, low: Tensor | None = None) -> Tensor:
        """Codes in floating point; products of float16 are computed in float32, since the largest would become infinite."""
        narrow = self.dtype is torch.float16
        real = codes.to(torch.float32 if narrow else self.dtype) * scale
        real = real if low is None else real + low
        most = torch.finfo(torch.float16).max
        return real.clamp(-most, most).to(self.dtype) if narrow else real.to(self.dtype)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.device, self.dtype, self.is_initialized = key_states.device, key_states.dtype, True

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in self.parts:
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))

    def _append(self, name: str, tensor: Tensor) -> None:
        held = getattr(self, name)
        setattr(self, name, tensor if held is None else torch.cat([held, tensor], -2))

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        count = query_length if isinstance(query_length, int) else query_length.shape[0]  # positions, before 5.12
        return self.get_seq_length() + count, 0

    def reset(self) -> None:
        for name in self.parts:
            setattr(self, name, None)
        self.is_initialized = False

    def crop(self, count: int) -> None:
        """Drop the last ``-count`` tokens; a positive ``count`` keeps that many, as in transformers before 5.24."""
        left = self.get_seq_length() + count if count <= 0 else count
        if self.is_initialized and left < self.get_seq_length():
            self._cut(max(left, 0))

    def _cut(self, left: int) -> None:
        raise NotImplementedError

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices])

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda t: t.to(self.device, non_blocking=True))


class Int8Layer(_Layer):  # type: ignore[no-untyped-call]
    """Attention reads all tokens back from codes, new ones too, so the result does not depend on how a text is split into calls."""

    key_codes: Any
    value_codes: Any
    key_scale: Any
    value_scale: Any
    parts = ("key_codes", "value_codes", "key_scale", "value_scale")  # codes int8 [B, H, T, D], scales [B, H, T, 1]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.lazy_initialization(key_states)
        for name, states in (("key", key_states), ("value", value_states)):
            peak = states.abs().amax(-1, keepdim=True).float()
            scale = floored(peak / 127, states.dtype)
            codes = (states.float() / scale).round_().clamp_(-127, 127)
            self._append(f"{name}_codes", codes.to(torch.int8))
            self._append(f"{name}_scale", (scale + 0 * peak).to(states.dtype))  # NaN and infinity stay visible
        return self._read()

    def _whole(self, name: str) -> Tensor:
        return self._real(getattr(self, f"{name}_codes"), getattr(self, f"{name}_scale"))

    def get_seq_length(self) -> int:
        return 0 if self.key_codes is None else int(self.key_codes.shape[-2])

    def _cut(self, left: int) -> None:
        self._map(lambda t: t[..., :left, :])


class Int4Layer(_Layer):  # type: ignore[no-untyped-call]
    """Groups of `GROUP` tokens are quantized once there are ``recent`` newer tokens."""

    recent_keys: Any
    recent_values: Any
    key_codes: Any
    value_codes: Any
    key_scale: Any
    key_low: Any
    value_scale: Any
    value_low: Any
    parts = (
        "recent_keys", "recent_values",  # newest tokens in floating point [B, H, R, D]
        "key_codes", "value_codes",  # uint8 [B, H, T, D / 2]
        "key_scale", "key_low",  # [B, H, T / GROUP, D]
        "value_scale", "value_low",  # [B, H, T, D / group]
    )  # fmt: skip

    def __init__(self, recent: int = RECENT) -> None:
        super().__init__()
        self.recent = recent

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.lazy_initialization(key_states)
        for states in (key_states, value_states):
            if states.shape[-1] % 8:
                raise HfQuantError(f"INT4 cache: heads of {states.shape[-1]} channels are no multiple of 8")
        self._append("recent_keys", key_states)
        self._append("recent_values", value_states)
        seen = self._read()
        ripe = (self.recent_keys.shape[-2] - self.recent) // GROUP * GROUP
        if ripe > 0:
            self._quantize(self.recent_keys[..., :ripe, :], self.recent_values[..., :ripe, :])
            self.recent_keys, self.recent_values = (
                self.recent_keys[..., ripe:, :].clone(),
                self.recent_values[..., ripe:, :].clone(),
            )
        return seen

    def _quantize(self, keys: Tensor, values: Tensor) -> None:
        codes, scale, low = _codes(keys.unflatten(-2, (-1, GROUP)), -2)
        self._append("key_codes", pack(codes.flatten(-3, -2), 4))
        self._append("key_scale", scale.squeeze(-2))
        self._append("key_low", low.squeeze(-2))
        codes, scale, low = _codes(values.unflatten(-1, (-1, math.gcd(GROUP, values.shape[-1]))), -1)
        self._append("value_codes", pack(codes.flatten(-2), 4))
        self._append("value_scale", scale.squeeze(-1))
        self._append("value_low", low.squeeze(-1))

    def _whole(self, name: str) -> Tensor:
        parts = (getattr(self, f"{name}_{part}") for part in ("codes", "scale", "low"))
        (codes, scale, low), recent = parts, getattr(self, f"recent_{name}s")
        if codes is None:
            return recent
        axis, shape = (-2, (-1, GROUP)) if name == "key" else (-1, (scale.shape[-1], -1))
        groups = unpack(codes, 4).unflatten(axis, shape)
        real = self._real(groups, scale.unsqueeze(axis), low.unsqueeze(axis)).flatten(axis - 1, axis)
        return torch.cat([real, recent], -2)

    def get_seq_length(self) -> int:
        coded = 0 if self.key_codes is None else int(self.key_codes.shape[-2])
        return coded + (0 if self.recent_keys is None else int(self.recent_keys.shape[-2]))

    def _cut(self, left: int) -> None:
        coded = 0 if self.key_codes is None else int(self.key_codes.shape[-2])
        if left < coded:  # tokens of an incomplete group go back to floating point
            keys, values = self._read()
            coded_tokens = left // GROUP * GROUP
            self.recent_keys, self.recent_values = (
                keys[..., coded_tokens:left, :].clone(),
                values[..., coded_tokens:left, :].clone(),
            )
            for name in self.parts[2:]:
                rows = coded_tokens // GROUP if name in ("key_scale", "key_low") else coded_tokens
                setattr(self, name, getattr(self, name)[..., :rows, :])
        else:
            self.recent_keys, self.recent_values = (
                self.recent_keys[..., : left - coded, :],
                self.recent_values[..., : left - coded, :],
            )


def _codes(groups: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of 0..15 along ``axis``, their scale and their lowest value, in the dtype of ``groups``."""
    wide = groups.float()
    low = wide.amin(axis, keepdim=True)
    scale = floored((wide.amax(axis, keepdim=True) - low) / 15, groups.dtype)
    low = low.to(groups.dtype)
    codes = ((wide - low.float()) / scale).round_().clamp_(0, 15)
    return codes.to(torch.uint8), (scale + 0 * low.float()).to(groups.dtype), low
