"""A tiny model with random weights of every model type that transformers can build from a configuration alone.

Every field of a configuration that says how large something is gets a small value (`SIZES`), in its sub-configurations too.
Where the parts of a model do not fit together then, one of the `VARIANTS` may; a model that cannot be built at all is named in
the table of `benchmarks/architectures.py`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.tiny_inputs import VOCABULARY, inputs_of, vocabulary_of

__all__ = ["build", "classes_of", "inputs_of", "model_types", "relative", "run", "vocabulary_of"]

LARGEST = 30_000_000  # parameters of a model that is still called tiny


def _fields(value: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, Any] = {
    **_fields(
        64,
        "hidden_size moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size d_model n_embd "
        "embedding_size embed_dim projection_dim out_hidden_size hidden_dim text_embed_dim dim emb_dim decoder_hidden_size "
        "encoder_hidden_size classifier_proj_size vision_hidden_size text_hidden_size projector_hidden_size conv_dim_size "
        "expert_ffn_hidden_size fft_dim adapter_dim expert_capacity word_embed_proj_dim moe_shared_expert_intermediate_size "
        "encoder_hidden_dim fusion_hidden_size output_dim max_source_positions max_target_positions upsample_groups "
        "hidden_size_global backbone_hidden_size audio_hidden_size condition_dim d_latents entity_emb_size",
    ),
    **_fields(
        128,
        "intermediate_size max_position_embeddings encoder_ffn_dim decoder_ffn_dim n_positions n_ctx d_ff ffn_dim mlp_dim "
        "decoder_intermediate_size inner_dim ffn_hidden_size dim_ff dff d_inner",
    ),
    **_fields(
        2,
        "num_hidden_layers num_key_value_heads encoder_layers decoder_layers n_layer num_experts_per_tok moe_topk moe_k "
        "linear_num_key_heads num_layers num_decoder_layers depth n_layers spatial_merge_size decoder_num_hidden_layers "
        "mamba_expand swa_num_key_value_heads num_attention_layers encoder_num_hidden_layers n_shared_experts "
        "num_encoder_layers resampler_depth num_blocks num_groups num_self_attends_per_block",
    ),
    **_fields(
        4,
        "num_attention_heads encoder_attention_heads decoder_attention_heads n_head num_experts n_routed_experts "
        "num_local_experts moe_num_experts linear_num_value_heads num_heads attention_heads n_heads "
        "decoder_num_attention_heads num_conv_pos_embedding_groups index_n_heads swa_num_attention_heads num_frames "
        "resampler_n_heads num_image_tokens linear_num_heads zero_expert_num",
    ),
    **_fields(
        16,
        "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim d_kv num_mel_bins "
        "mamba_d_head mamba_d_state state_size mamba_head_dim ssm_state_size mamba_chunk_size chunk_size "
        "num_conv_pos_embeddings index_head_dim index_topk kv_channels swa_head_dim lora_rank global_head_dim laurel_rank "
        "attention_head_dim resampler_head_dim block_size dim_head linear_head_dim o_lora_rank shape_size",
    ),
    **_fields(
        32,
        "kv_lora_rank q_lora_rank qk_head_dim image_size sliding_window codevector_dim proj_codevector_dim "
        "hidden_size_per_layer_input max_relative_positions max_length",
    ),
    **_fields(
        8,
        "rotary_dim patch_size mamba_n_heads mamba_num_heads num_codevectors_per_group time_step_rank attention_window "
        "resampler_n_latents coordinate_size num_latents",
    ),
    **_fields(
        1,
        "n_group topk_group mamba_n_groups n_groups num_hidden_groups first_k_dense_replace num_random_blocks moe_layer_freq",
    ),
    **_fields(0, "num_mtp_layers num_nextn_predict_layers"),
    **_fields(VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size encoder_hash_byte_group_vocab entity_vocab_size"),
    "num_labels": 3, "layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "rotary_pct": 0.5, "num_filters": 32,
    "prediction_length": 4, "width_coefficient": 0.05, "depth_coefficient": 0.5, "vocabulary_map": {"<image>": 200},
    "use_mamba_kernels": False, "default_language": "en_XX",
    "use_stochastic_duration_prediction": False,
}  # fmt: skip
SHRINKS_ONLY = {"hidden_size", "intermediate_size"}  # all other sizes that are smaller by default stay so
STAY_NONE = {
    "head_dim", "sliding_window", "q_lora_rank", "moe_layer_freq", "num_labels", "vocab_size_per_layer_input",
    "qk_head_dim", "num_decoder_layers",
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_MROPE_NONE = STAY_NONE - {"head_dim", "qk_head_dim", "num_decoder_layers"}
_STAGES = (
    "embed_dim",
    "hidden_size",
    "image_size",
    "patch_size",
    "num_heads",
    "encoder_hidden_dim",
    "intermediate_size",
)
_WIDE = dict.fromkeys(("hidden_size", "d_model", "text_hidden_size"), 256) | {
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128,
}  # fmt: skip
RESNET = {
    "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
_LEVELS = dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), 4)


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs from `SIZES`: other sizes, fields that stay None, fields left alone, the rotary embedding, and exact values."""

    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    none: frozenset[str] = frozenset(STAY_NONE)
    untouched: frozenset[str] = frozenset()
    rope: Mapping[str, Any] | None = None
    text_layers: int | None = None
    exact: Mapping[str, Any] = dataclasses.field(default_factory=dict)


VARIANTS = {
    "": Variant(),
    "mha": Variant({"num_key_value_heads": 4}),
    "hd16": Variant({"num_key_value_heads": 4}, none=frozenset()),
    "hd128": Variant(_WIDE),
    "mrope": Variant(rope=MROPE, none=frozenset(_MROPE_NONE)),
    "layers4": Variant(dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), 4)),
    "heads2": Variant({"num_attention_heads": 2, "num_key_value_heads": 2}),
    "swa": Variant({"sliding_window": 16}, none=frozenset({"q_lora_rank"})),
    "layers8": Variant(dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), 8)),
    "text3": Variant(text_layers=3),
    "text3mrope": Variant(rope=MROPE, none=frozenset(_MROPE_NONE), text_layers=3),
    "ropes": Variant(rope={"full_attention": _ROPE, "sliding_attention": _ROPE}),
    "decoder": Variant(exact={"is_decoder": True}),
    "heads8": Variant({"num_heads": 8}),
    "decoder128": Variant(_WIDE, exact={"is_decoder": True}),
    "even": Variant({"num_key_value_heads": 4}, exact={"per_layer_config": {}}),
    "codebook": Variant(exact={"codebook_dim": 64}),
    "resnet": Variant(exact={"backbone_config": RESNET, "use_timm_backbone": False}),
    "patterns": Variant(
        exact={"attention_types": [[["global", "local"], 1]], "layers_block_type": ["mamba", "hybrid"]}
    ),
    "conv": Variant(exact={"layer_types": ["conv", "full_attention"]}),
    "mamba": Variant(exact={"layer_types": ["mamba", "attention"]}),
    "linear": Variant(exact={"layer_types": ["linear_attention", "full_attention"]}),
    "full": Variant(exact={"layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 0}),
    "stages": Variant(untouched=frozenset(_STAGES)),
    "levels": Variant(_LEVELS, exact={"backbone_out_indices": [0, 1, 2, 3], "out_indices": [1, 2, 3, 4]}),
    "levels96": Variant(_LEVELS, untouched=frozenset(_STAGES), exact={"out_indices": [1, 2, 3, 4]}),
    "defaults": Variant(untouched=frozenset(SIZES) - {"vocab_size"}),
    "dense": Variant(untouched=frozenset({"sliding_window", "head_dim", "depth", "patch_size", "image_size"})),
}
_IDS = ("token_id", "token_index", "token_idx", "_id", "_index")
_AUTOS = (
    "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM",
    "SEQUENCE_CLASSIFICATION",
)  # fmt: skip
_OTHERS = (
    "CTC", "RNNT", "TDT", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION", "TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM", "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION", "DEPTH_ESTIMATION", "TIME_SERIES_PREDICTION", "RETRIEVAL",
    "MASK_GENERATION", "PRETRAINING",
)  # fmt: skip


def model_types() -> list[str]:
    """All model types of the installed transformers."""
    return sorted(CONFIG_MAPPING)


def classes_of(model_type: str) -> list[str]:
    """Names of the classes of a model type to try: those with a text head, else one for another task, else the plain model."""
    names = [name for auto in _AUTOS if (name := _class_for(f"MODEL_FOR_{auto}", model_type))]
    names = list(dict.fromkeys(names)) or [n for a in _OTHERS if (n := _class_for(f"MODEL_FOR_{a}", model_type))][:1]
    names = names or [name for name in [_class_for("MODEL", model_type)] if name]
    return [name for name in names if "dummy" not in str(getattr(transformers, name, "dummy"))]


def _class_for(auto: str, model_type: str) -> str | None:
    name = getattr(modeling_auto, f"{auto}_MAPPING_NAMES").get(model_type)
    return name[0] if isinstance(name, tuple) else name


def build(model_type: str, class_name: str, variant: str = "") -> Any:
    """A tiny model in evaluation mode; the same one for the same arguments.

    Raises:
        Exception: Of any type: what the model's own code raises.
    """
    kind = getattr(transformers, class_name)
    config = tiny_config(CONFIG_MAPPING[model_type], VARIANTS[variant])
    if kind.config_class is not None and not isinstance(config, kind.config_class):
        parts = [getattr(config, part, None) for part in ("text_config", "thinker_config")]
        config = next((part for part in parts if isinstance(part, kind.config_class)), config)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    with torch.device("meta"):
        parameters = sum(p.numel() for p in kind(config).parameters())
    if parameters > LARGEST:
        raise ValueError(f"it has {parameters / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():  # so that a bias or a scale that gets lost is noticed
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and parameter.numel() > 1 and not parameter.std() and "A_log" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        for (
            name,
            module,
        ) in model.named_modules():  # lengths that hardly depend on values, so that outputs can be compared
            last = getattr(module, "linear", getattr(module, "proj", None))
            if name.endswith("duration_predictor") and isinstance(last, nn.Linear | nn.Conv1d):
                last.weight.mul_(0.01)
                last.bias.fill_(1.2)
    return model


def tiny_config(kind: Any, variant: Variant) -> Any:
    """A configuration of class ``kind`` with small sizes, sub-configurations included."""
    default = _default(kind)
    parts = dict(getattr(kind, "sub_configs", None) or {})
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name in parts or field.name in ("dtype", "problem_type", "id2label", "label2id"):
            continue
        value = _small(field.name, _default_of(field), variant) if _holds_numbers(field) else None
        value = variant.exact.get(field.name, value)
        if value is not None:
            values[field.name] = value
    for name, part in parts.items():
        current = getattr(default, name, None)
        if default is not None and current is None:
            continue
        part = type(current) if isinstance(current, PretrainedConfig) else part
        if isinstance(part, type) and part is not PretrainedConfig and part.__name__ != "AutoConfig":
            layers = variant.text_layers if name == "text_config" else None
            sizes = {**variant.sizes, **({"num_hidden_layers": layers} if layers else {})}
            values[name] = tiny_config(part, dataclasses.replace(variant, sizes=sizes)).to_dict()
    values |= {name: value for name, value in variant.exact.items() if name in parts}
    for name, value in (
        ("pad_token_id", 0),
        ("num_time_features", 2),
    ):  # without the last a series would have an empty input
        if any(field.name == name for field in dataclasses.fields(kind)):
            values[name] = value
    return kind(**values)


def _default(kind: Any) -> Any:
    try:
        return kind()
    except Exception:  # some need arguments
        return None


def _default_of(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


def _holds_numbers(field: Any) -> bool:
    """Whether a field may hold something else than a list."""
    kind = str(field.type)
    return not kind.startswith("list[") or "int" in kind.split(" | ")


def _small(name: str, default: Any, variant: Variant) -> Any:
    """The value of a field; None to leave it at its default."""
    if name in variant.untouched:
        return None
    if name in ("rope_parameters", "rope_scaling") and variant.rope is not None:
        return dict(variant.rope)
    if name in SIZES:
        return _size(name, default, variant)
    if name.endswith(_IDS) and type(default) is int and default >= VOCABULARY:
        return 150 + zlib.crc32(name.encode()) % 100
    return None


def _size(name: str, default: Any, variant: Variant) -> Any:
    value = variant.sizes.get(name, SIZES[name])
    if default is None:
        return None if name in variant.none else value
    if name == "image_size" and isinstance(default, list | tuple):
        return [value] * len(default)
    if isinstance(default, list | tuple | dict | str) or isinstance(default, bool) != isinstance(value, bool):
        return None
    smaller = type(value) is int and isinstance(default, int | float) and default < value
    return None if smaller and name not in SHRINKS_ONLY else value


@torch.no_grad()
def run(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The logits, or all floating-point outputs in one vector; the same for the same model."""
    torch.manual_seed(1)  # for models that draw random numbers
    out = model(**inputs)
    if isinstance(out, Mapping) and isinstance(out.get("logits"), Tensor):
        return out["logits"].float()
    outputs = [tensor.float().flatten() for tensor in _floats(out)]
    return torch.cat(outputs) if outputs else torch.zeros(0)


def _floats(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        if out.is_floating_point():
            yield out
    elif isinstance(out, Mapping):
        for name, value in out.items():
            if "past_key" not in name and "cache" not in name:
                yield from _floats(value)
    elif isinstance(out, tuple | list):
        for value in out:
            yield from _floats(value)


def relative(one: Tensor, other: Tensor) -> float:
    """The distance of two outputs in parts of the second; infinite where they cannot be compared."""
    finite = other.isfinite()
    if one.shape != other.shape or not torch.equal(one.isfinite(), finite):
        return float("inf")
    return float((one[finite] - other[finite]).norm() / (other[finite].norm() + 1e-12))


def built(model_type: str, class_name: str, variant: str | None = None) -> tuple[Any, str]:
    """A model that also runs, and the variant of it."""
    first: Exception | None = None
    for name in VARIANTS if variant is None else [variant]:
        try:
            model = build(model_type, class_name, name)
            run(model, inputs_of(model))
            return model, name
        except Exception as error:  # of any type: the model's own code
            first = first or error
    raise NotBuiltError(f"{type(first).__name__}: {first}")


class NotBuiltError(Exception):
    """No variant of a class can be built and run in floating point."""
