"""GGUF as llama.cpp's own package has it: bytes of blocks, files written and read, and what strangers' files may hold."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.core.k_quants import K_QUANTS
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.errors import CheckpointError, FormatError, HfQuantError, OptionError
from hf_quant.gguf.architectures import (
    ROPE,
    config_of,
    gguf_name,
    metadata_of,
    model_name,
    of_config,
    of_file,
    row_order,
)
from hf_quant.gguf.blocks import BLOCKS, dequantize, pack, unpack
from hf_quant.gguf.codes import blocks_of, tensor_of
from hf_quant.gguf.file import File
from hf_quant.jobs.convert import convert
from hf_quant.methods import method

gguf: Any = pytest.importorskip("gguf")
SHAPE = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 128}  # fmt: skip
IDS = torch.arange(1, 33)[None]


def blocks(name: str, rows: int = 7, count: int = 2) -> torch.Tensor:
    """Random bytes with scales that are numbers; a scale of zero too."""
    block = BLOCKS[name]
    data = torch.randint(0, 256, (rows, count, block.size), dtype=torch.uint8)
    for at in (at for at in (block.d, block.dmin) if at is not None):
        data[..., at : at + 2] = (torch.randn(rows, count, 1) * 0.01).half().view(torch.uint8)
    data[0, 0, block.d : block.d + 2] = 0
    return data.flatten(1)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_what_the_package_makes_of_them(name: str) -> None:
    block, kind = BLOCKS[name], gguf.GGMLQuantizationType[name]
    assert kind.value == block.number and gguf.GGML_QUANT_SIZES[kind] == (block.weights, block.size)
    data = blocks(name)
    theirs = torch.from_numpy(gguf.dequantize(data.numpy(), kind))
    assert torch.equal(dequantize(data, block), theirs)
    assert torch.equal(pack(unpack(data, block), block), data)
    tensor = tensor_of(unpack(data, block), block)
    made = tensor.dequantize(torch.float32)
    if tensor.scheme.real_zero and not tensor.scheme.blocks:  # (q - z) * s rounds where q * s - m does not
        assert float((made - theirs).abs().max() / theirs.abs().max()) < 3e-7
    else:
        assert torch.equal(made, theirs)
    fit = blocks_of(tensor)
    assert fit.block is block and torch.equal(dequantize(pack(fit.parts, block), block), theirs)


HELD = {
    "W4A16-g32": "Q4_0", "W4A16-g128": "Q4_0", "W4A16-g-1": "Q4_0", "W3A16-g32-asym": "Q4_0", "W2A16-g64": "Q4_0",
    "W4A16-g32-asym": "Q5_0", "W8A16-g64": "Q8_0", "W4A8-g32": "Q4_0",
}  # fmt: skip


@pytest.mark.parametrize("slug", HELD)
def test_the_smallest_type_that_holds_the_codes(slug: str) -> None:
    tensor = method("rtn").quantize(torch.randn(16, 512), QuantScheme.parse(slug), torch.float16)
    fit = blocks_of(tensor)
    assert fit.block.name == HELD[slug]
    theirs = gguf.dequantize(pack(fit.parts, fit.block).numpy(), gguf.GGMLQuantizationType[fit.block.name])
    assert torch.equal(torch.from_numpy(theirs), tensor.dequantize(torch.float32))


@pytest.mark.parametrize("name", K_QUANTS)
@pytest.mark.parametrize("how", ["rtn", "gptq"])
def test_k_quants_of_our_own_are_what_the_package_reads(how: str, name: str) -> None:
    """Also rows of zeros, of one value and of one sign, and weights so small that d is a subnormal number."""
    weight = torch.randn(8, 512) * 0.02
    for row, values in enumerate((0, 0.01, weight[2].abs(), -weight[3].abs(), weight[4] * 1e-4)):
        weight[row] = values
    stats = None
    if how == "gptq":
        stats = InputStats.empty(512)
        stats.update(torch.randn(1024, 512) * torch.rand(512))
    more = {"sweeps": 2} if how == "gptq" else {}
    tensor = method(how, **more).quantize(weight, QuantScheme.parse(name), torch.bfloat16, stats)
    fit = blocks_of(tensor)
    data = pack(fit.parts, fit.block)
    theirs = torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[name]))
    assert fit.block.name == name
    torch.testing.assert_close(tensor.dequantize(torch.float32), theirs, rtol=0, atol=3e-7 * float(theirs.abs().max()))
    assert torch.equal(tensor_of(unpack(data, fit.block), fit.block).dequantize(torch.float32), theirs)


def test_offsets_that_float16_holds_take_fewer_bits() -> None:
    tensor = method("rtn").quantize(torch.randn(16, 512), QuantScheme(4, 32, False), torch.float16)
    coarse = tensor.scale.view(torch.int16).bitwise_and(~15).view(torch.float16)  # seven bits fewer
    tensor = type(tensor)(tensor.qweight, coarse, tensor.zero_point, tensor.scheme)
    fit = blocks_of(tensor)
    assert fit.block.name == "Q4_1"
    again = tensor_of(fit.parts, fit.block)
    assert again.scheme == tensor.scheme and torch.equal(again.qweight, tensor.qweight)


def test_offsets_that_float16_does_not_hold_are_named() -> None:
    tensor = tensor_of(unpack(blocks("Q4_1"), BLOCKS["Q4_1"]), BLOCKS["Q4_1"])
    assert tensor.zero_point is not None
    for scale, zero in ((tensor.scale * 1.0001, tensor.zero_point), (tensor.scale, tensor.zero_point + 1e-3)):
        with pytest.raises(FormatError, match=r"Q4_1, with scales and offsets of float16"):
            blocks_of(type(tensor)(tensor.qweight, scale, zero, tensor.scheme))


@pytest.mark.parametrize(
    "slug", ["W4A16-g32-nf4", "W4A16-g32-perm", "W4A16-g32-o1%", "W4A16-g64-asym-real", "W8A16-g32-asym"]
)
def test_what_no_type_holds_is_said(slug: str) -> None:
    scheme = QuantScheme.parse(slug)
    with pytest.raises(FormatError, match=r"GGUF|K-quants|Q4_K|Q8_0"):
        if scheme.foreign:
            blocks_of(type(tensor_of(unpack(blocks("Q4_0"), BLOCKS["Q4_0"]), BLOCKS["Q4_0"]))(
                torch.zeros(4, 256, dtype=torch.uint8), torch.ones(4, 8), None, scheme))  # fmt: skip
        else:
            blocks_of(method("rtn", steps=0).quantize(torch.randn(16, 512) + 2, scheme, torch.float16))


def checkpoint(folder: Path, kind: str, scheme: str = "W4A16-g32", **how: Any) -> Any:
    made = {"llama": (tf.LlamaConfig, tf.LlamaForCausalLM), "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM),
            "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM)}[kind]  # fmt: skip
    torch.manual_seed(3)
    made[1](made[0](**SHAPE, bos_token_id=None, eos_token_id=None, **how)).half().save_pretrained(folder / "float")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {letter: i for i, letter in enumerate([*"abcdefghij0123456789!Ġ", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    config = HfQuantConfig(scheme, method="rtn")
    model = tf.AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config, dtype=torch.float16)
    model.save_pretrained(folder / "quantized")
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder / "quantized")
    return model


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints ``float`` and ``quantized``, and the latter in ``gguf``."""
    folder = tmp_path_factory.mktemp("qwen3")
    checkpoint(folder, "qwen3")
    convert(folder / "quantized", folder / "gguf", to="gguf")
    return folder


@pytest.mark.parametrize(("kind", "scheme", "how"), [
    ("llama", "W4A16-g32", {"tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}}),
    ("qwen2", "Q3_K", {}),
])  # fmt: skip
def test_there_and_back_with_the_same_logits(
    kind: str, scheme: str, how: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("HF_QUANT_BACKEND", "reference")
    model = checkpoint(tmp_path, kind, scheme, **how)
    done = convert(tmp_path / "quantized", tmp_path / "gguf", to="gguf")
    assert done.layers == 14 and done.to == "gguf"
    reader = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf")
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    weight = torch.from_numpy(
        gguf.dequantize(theirs["blk.1.ffn_down.weight"].data, theirs["blk.1.ffn_down.weight"].tensor_type)
    )
    assert torch.equal(weight, model.model.layers[1].mlp.down_proj.dequantize(torch.float32))
    assert theirs["blk.1.ffn_down.weight"].tensor_type.name == {"W4A16-g32": "Q4_0"}.get(scheme, scheme)
    assert reader.get_field("general.architecture").contents() == kind
    back = convert(tmp_path / "gguf" / "model.gguf", tmp_path / "back", to="native")
    assert back.source == "gguf"
    again = hf_quant.load(str(tmp_path / "back"), dtype=torch.float32)
    first = hf_quant.load(str(tmp_path / "quantized"), dtype=torch.float32)
    assert torch.equal(again(IDS).logits, first(IDS).logits)
    tokenizers = [tf.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("quantized", "back")]
    assert tokenizers[0]("ab 1!").input_ids == tokenizers[1]("ab 1!").input_ids


def test_files_of_others_run_packed(qwen3: Path, tmp_path: Path) -> None:
    """K-quants as the package has them, random codes: the model computes what a float model with these weights does."""
    reader = gguf.GGUFReader(qwen3 / "gguf" / "model.gguf")
    names = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_1", "Q8_0"]
    writer, dense = gguf.GGUFWriter(tmp_path / "k.gguf", "qwen3"), {}
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and "tokenizer" not in key:
            writer.add_key_value(key, field.contents(), field.types[0])
    for at, tensor in enumerate(reader.tensors):
        shape = list(reversed(tensor.shape.tolist()))
        kind = gguf.GGMLQuantizationType[names[at % 7]]
        if len(shape) == 2:
            data = blocks(kind.name, shape[0], shape[1] // BLOCKS[kind.name].weights)
            writer.add_tensor(tensor.name, data.numpy(), raw_dtype=kind)
            dense[model_name(tensor.name)] = torch.from_numpy(gguf.dequantize(data.numpy(), kind))
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert(tmp_path / "k.gguf", tmp_path / "k", to="native")
    stored = json.loads((tmp_path / "k" / "config.json").read_text())["quantization_config"]
    assert stored["quantize_embeddings"] is True
    model = hf_quant.load(str(tmp_path / "k"), dtype=torch.float32)
    twin = tf.AutoModelForCausalLM.from_pretrained(qwen3 / "float", dtype=torch.float32)
    assert set(dense) <= set(twin.state_dict())
    twin.load_state_dict(twin.state_dict() | dense)
    with torch.no_grad():
        theirs = twin(IDS).logits
        torch.testing.assert_close(model(IDS).logits, theirs, rtol=0, atol=2e-2 * float(theirs.abs().max()))
    convert(tmp_path / "k", tmp_path / "dense", to="dense")
    with pytest.raises(HfQuantError, match="hf-quant convert"):
        hf_quant.quantize(tmp_path / "k.gguf", tmp_path / "x", scheme="W4A16-g32")


def test_names_and_order_of_rows() -> None:
    for name in (
        "model.layers.3.self_attn.q_proj.bias",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
    ):
        assert model_name(gguf_name(name)) == name
    with pytest.raises(FormatError, match="no place"):
        gguf_name("model.layers.0.mlp.experts.0.up_proj.weight")
    from hf_quant.gguf.architectures import ARCHITECTURES

    order = row_order("blk.0.attn_k.weight", ARCHITECTURES[0], {"num_attention_heads": 4, "num_key_value_heads": 2}, 8)
    assert order is not None and order.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


# -- hostile files ------------------------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def info(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def whole(keys: list[bytes] = [], infos: list[bytes] = [], data: bytes = bytes(64), **counts: int) -> bytes:  # noqa: B006
    head = struct.pack(
        "<4sIQQ", b"GGUF", counts.get("version", 3), counts.get("tensors", len(infos)), counts.get("keys", len(keys))
    )
    raw = head + b"".join(keys) + b"".join(infos)
    return raw + bytes(-len(raw) % 32) + data


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "other magic": (b"GGML" + bytes(20), "GGUF"),
    "version 1": (whole(version=1), "version 1"),
    "big-endian": (whole(version=3 << 24), "big-endian"),
    "2**63 tensors": (whole(tensors=2**63), "number of tensors"),
    "65536 tensors in no bytes": (whole(tensors=1 << 16), "number of tensors"),
    "a string of 2**62 bytes": (whole([struct.pack("<Q", 2**62)]), "truncated"),
    "an array of 2**61 numbers": (whole([key("a", 9, struct.pack("<IQ", 0, 2**61))]), "length of a"),
    "an array of 2**40 strings": (whole([key("a", 9, struct.pack("<IQ", 8, 2**40))]), "length of a"),
    "an array of arrays": (whole([key("a", 9, struct.pack("<IQ", 9, 1))]), "array of type 9"),
    "a type that is none": (whole([key("a", 77, b"")]), "no type 77"),
    "a key twice": (whole([key("a", 0, b"x"), key("a", 0, b"x")]), "twice"),
    "a key that is not UTF-8": (whole([text(b"\xff\xfe") + struct.pack("<IB", 0, 1)]), "UTF-8"),
    "an alignment of three": (whole([key("general.alignment", 4, struct.pack("<I", 3))]), "alignment"),
    "a part of several": (whole([key("split.count", 2, struct.pack("<H", 3))]), "several parts"),
    "five axes": (whole(infos=[info("t", [1] * 5)]), "5 axes"),
    "an axis of zero": (whole(infos=[info("t", [0, 4])]), "shape"),
    "an axis of 2**62": (whole(infos=[info("t", [2**62, 4])]), "shape"),
    "a product of 2**80": (whole(infos=[info("t", [2**40, 2**40])]), "truncated"),
    "an unknown type": (whole(infos=[info("t", [4], 99)]), "type 99"),
    "a type that is not read": (whole(infos=[info("t", [256], 23)]), "IQ4_XS"),
    "half a block": (whole(infos=[info("t", [48], 2)]), "blocks of 32"),
    "an offset outside": (whole(infos=[info("t", [4], 0, 2**40)]), "truncated"),
    "an offset that is not aligned": (whole(infos=[info("t", [4], 0, 1)]), "aligned"),
    "two that overlap": (whole(infos=[info("t", [4]), info("u", [4])]), "overlaps t"),
    "a tensor twice": (whole(infos=[info("t", [4]), info("t", [4], 0, 32)]), "twice"),
    "a name that climbs": (whole(infos=[info("../t", [4])]), "not allowed"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[case][0])
    with pytest.raises(CheckpointError, match=HOSTILE[case][1]) as error:
        File.open(path)
    assert "x.gguf" in str(error.value)


def test_every_cut_and_every_flipped_byte_of_a_header_is_refused_or_read(qwen3: Path, tmp_path: Path) -> None:
    raw = (qwen3 / "gguf" / "model.gguf").read_bytes()
    path, generator = tmp_path / "y.gguf", torch.Generator().manual_seed(5)
    for _ in range(150):
        spoilt, at = bytearray(raw[: 1 << 14]), int(torch.randint(0, 6000, (), generator=generator))
        spoilt[at] ^= 1 << int(torch.randint(0, 8, (), generator=generator))
        path.write_bytes(bytes(spoilt) + raw[1 << 14 :])
        with suppress(CheckpointError):
            File.open(path)
    for cut in range(0, 6000, 97):
        path.write_bytes(raw[:cut])
        with pytest.raises(CheckpointError):
            File.open(path)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no architecture": (lambda keys: keys.pop("general.architecture"), "architecture"),
    "another architecture": (lambda keys: keys.update({"general.architecture": "mamba"}), "mamba"),
    "a size that is text": (lambda keys: keys.update({"qwen3.embedding_length": "256"}), "embedding_length"),
    "a size of zero": (lambda keys: keys.update({"qwen3.block_count": 0}), "block_count"),
    "more blocks than it says": (lambda keys: keys.update({"qwen3.block_count": 1}), "blk.1"),
    "tokens of two kinds": (lambda keys: keys.update({"tokenizer.ggml.token_type": [1]}), "token_type"),
    "a scaling that is not read": (lambda keys: keys.update({"qwen3.rope.scaling.type": "longrope"}), "longrope"),
    "a scaling by text": (lambda keys: keys.update({"qwen3.rope.scaling.factor": "4"}), "scaling.factor"),
    "a factor of attention": (lambda keys: keys.update({"qwen3.rope.scaling.attn_factor": 2.0}), "attn_factor"),
    "a merge of nothing": (lambda keys: keys.update({"tokenizer.ggml.merges": ["x y z"]}), "merges"),
}


@pytest.mark.parametrize("case", WRONG)
def test_metadata_that_contradicts_itself_is_refused(
    qwen3: Path, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = File.open(qwen3 / "gguf" / "model.gguf")
    WRONG[case][0](opened.metadata)
    monkeypatch.setattr(File, "open", lambda path: opened)
    with pytest.raises(CheckpointError, match=WRONG[case][1]):
        convert(qwen3 / "gguf" / "model.gguf", tmp_path / "out", to="native")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["dense", "native", "gguf"])
@pytest.mark.parametrize(
    ("name", "parameter"), [("blk.0.attn_q.weight", "q_proj.weight"), ("blk.1.ffn_norm.weight", "post_attention")]
)
def test_files_that_lack_a_tensor_are_refused(
    qwen3: Path, name: str, parameter: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that is missing would be a random one."""
    source = qwen3 / "gguf" / "model.gguf"
    opened = File.open(source)
    del opened.tensors[name]
    monkeypatch.setattr(File, "open", lambda path: opened)
    with pytest.raises(CheckpointError, match=rf"{parameter}.* is missing"):
        convert(source, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_a_file_keeps_its_name_and_the_record_says_what_it_was(qwen3: Path, tmp_path: Path) -> None:
    assert File.open(qwen3 / "gguf" / "model.gguf").metadata["general.name"] == "quantized"
    shutil.copy(qwen3 / "gguf" / "model.gguf", tmp_path / "MODEL.GGUF")
    done = convert(tmp_path / "MODEL.GGUF", tmp_path / "again", to="gguf")
    assert done.source == "gguf" and json.loads((tmp_path / "again" / "conversion.json").read_text())["from"] == "gguf"
    assert File.open(tmp_path / "again" / "model.gguf").metadata["general.name"] == "quantized"
    with pytest.raises(OptionError, match="--revision main"):
        convert(tmp_path / "MODEL.GGUF", tmp_path / "out", to="native", revision="main")


def test_a_model_of_the_hub_is_called_as_on_the_hub(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_quant.jobs.convert.downloaded", lambda *_: qwen3 / "quantized")
    convert("somebody/a-model", tmp_path / "out", to="gguf")
    assert File.open(tmp_path / "out" / "model.gguf").metadata["general.name"] == "a-model"


def test_a_tokenizer_that_is_lost_is_named(qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(qwen3 / "quantized", tmp_path / "quantized")
    (tmp_path / "quantized" / "tokenizer.json").unlink()
    lines: list[str] = []
    convert(tmp_path / "quantized", tmp_path / "gguf", to="gguf", say=lines.append)
    assert any("without a tokenizer" in line for line in lines)
    opened = File.open(qwen3 / "gguf" / "model.gguf")
    opened.metadata["tokenizer.ggml.model"] = "llama"
    monkeypatch.setattr(File, "open", lambda path: opened)
    convert(qwen3 / "gguf" / "model.gguf", tmp_path / "back", to="native", say=lines.append)
    assert any("model.gguf: its tokenizer ('llama', 'gpt-2') is not read" in line for line in lines)


SCALED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "linear, by its old name": ({"../scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    "none": ({"type": "none", "factor": 4.0}, {"rope_type": "default"}),
    "by one": ({"type": "yarn", "factor": 1.0}, {"rope_type": "default"}),
    "yarn": ({"type": "yarn", "factor": 4.0, "original_context_length": 32},
             {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    "yarn of the whole context": ({"type": "yarn", "factor": 4.0},
                                  {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
}  # fmt: skip


@pytest.mark.parametrize("case", SCALED)
def test_scaled_rotary_embeddings_are_read_as_llama_cpp_reads_them(qwen3: Path, case: str) -> None:
    keys, expected = SCALED[case]
    metadata = File.open(qwen3 / "gguf" / "model.gguf").metadata
    metadata |= {f"qwen3.rope.scaling.{key}".replace("scaling.../", ""): value for key, value in keys.items()}
    config = config_of(metadata, of_file(metadata), 64, tied=False, bias=False)
    assert config["rope_parameters"] == {"rope_theta": 10000.0} | expected
    written = metadata_of(config | {"vocab_size": 64}, of_file(metadata))
    again = config_of(written, of_file(metadata), 64, tied=False, bias=False)
    assert again["rope_parameters"] == config["rope_parameters"]


def test_scalings_without_a_place_are_refused(qwen3: Path) -> None:
    config = json.loads((qwen3 / "quantized" / "config.json").read_text())
    for rope, reason in (
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5}, "attention_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ):
        with pytest.raises(FormatError, match=reason):
            metadata_of(config | {"rope_parameters": rope}, of_config(config))


def test_divisors_of_rotary_embeddings_that_are_quantized_are_refused(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = File.open(qwen3 / "gguf" / "model.gguf")
    opened.tensors[ROPE] = opened.tensors["blk.0.ffn_up.weight"]
    monkeypatch.setattr(File, "open", lambda path: opened)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight: Q4_0, expected F32"):
        convert(qwen3 / "gguf" / "model.gguf", tmp_path / "out", to="native")


def test_fields_that_config_json_does_not_have_are_those_of_transformers(qwen3: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen3 / "quantized", tmp_path / "quantized")
    path = tmp_path / "quantized" / "config.json"
    config = json.loads(path.read_text())
    for name in ("rms_norm_eps", "max_position_embeddings", "bos_token_id"):
        config.pop(name, None)
    path.write_text(json.dumps(config | {"pad_token_id": -1, "rope_parameters": None}))
    convert(tmp_path / "quantized", tmp_path / "out", to="gguf")
    metadata = File.open(tmp_path / "out" / "model.gguf").metadata
    assert metadata["qwen3.context_length"] == tf.Qwen3Config().max_position_embeddings
    assert metadata["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(tf.Qwen3Config().rms_norm_eps)
    assert not [key for key in metadata if key.endswith("token_id")]


def test_as_many_heads_of_keys_as_of_queries_need_not_be_said() -> None:
    config = tf.LlamaConfig(**SHAPE | {"num_key_value_heads": None}).to_dict()
    assert metadata_of(config, of_config(config))["llama.attention.head_count_kv"] == SHAPE["num_attention_heads"]


def test_scales_that_are_no_numbers_are_refused(qwen3: Path, tmp_path: Path) -> None:
    path = shutil.copy(qwen3 / "gguf" / "model.gguf", tmp_path / "model.gguf")
    stored = File.open(path).tensors["blk.0.ffn_up.weight"]
    raw = bytearray(path.read_bytes())
    raw[stored.offset : stored.offset + 2] = b"\x00\x7e"  # NaN
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"ffn_up.*finite"):
        convert(path, tmp_path / "out", to="native")


def test_other_architectures_and_tokenizers_are_refused_before_anything_is_written(
    qwen3: Path, tmp_path: Path
) -> None:
    shutil.copytree(qwen3 / "quantized", tmp_path / "quantized")
    path = tmp_path / "quantized" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(FormatError, match=r"^--to gguf: model_type 'gpt2': .*convert_hf_to_gguf"):
        convert(tmp_path / "quantized", tmp_path / "out", to="gguf")
    path.write_text(json.dumps(config))
    file = tmp_path / "quantized" / "tokenizer.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"pre_tokenizer": {"type": "Whitespace"}}))
    with pytest.raises(FormatError, match="Whitespace"):
        convert(tmp_path / "quantized", tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()
