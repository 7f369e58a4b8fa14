"""Files that are small and ask for much: time and memory are in proportion to the file, and messages are short and printable."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from click.testing import CliRunner
from safetensors.torch import save_file

import hf_quant
from hf_quant.checkpoint.config import check_config
from hf_quant.checkpoint.folder import INDEX, WEIGHTS, Checkpoint
from hf_quant.cli import main
from hf_quant.disk.safetensors import read_header
from hf_quant.disk.strict_json import MAX_VALUES, parsed
from hf_quant.errors import LONGEST, CheckpointError, DiskError, FormatError, HfQuantError, printable
from hf_quant.formats import format_of
from hf_quant.hf.auto import class_of, config_of
from hf_quant.hf.checkpoint_tensors import Tensors
from hf_quant.hf.config import taken_over
from hf_quant.hf.integrity import check_weights


def test_keys_that_stand_twice_are_found_in_one_pass() -> None:
    keys = ",".join(f'"k{i}":0' for i in range(100_000))  # took the square of that: a quarter of an hour
    with pytest.raises(CheckpointError, match=r"config\.json: key 'k99999' stands twice"):
        parsed(f'{{{keys},"k99999":0}}'.encode(), "config.json")


@pytest.mark.parametrize("item", ["{}", "[]", "0", '""'])
def test_more_values_than_memory_was_allowed_for(item: str, tmp_path: Path) -> None:
    many = f'{{"x":[{",".join([item] * MAX_VALUES)}]}}'.encode()
    for name in ("config.json", INDEX):
        with pytest.raises(CheckpointError, match=rf"{name}: file holds about \d+ values, the limit is"):
            parsed(many, name)
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(many)) + many)
    with pytest.raises(CheckpointError, match=r"header holds about"):
        read_header(tmp_path / WEIGHTS)


def stored(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "hf_quant", "version": 1, "format": "native", "scheme": "W4A16-g32"} | fields


def test_patterns_without_end() -> None:
    overrides = {f"*a*b{i}*": "W8A16-g32" for i in range(20_000)}
    codes = {"weight": torch.zeros(32, 16, dtype=torch.uint8), "weight_scale": torch.ones(32, 1)}
    fmt = format_of(stored(overrides=overrides))[1]
    with pytest.raises(FormatError, match=r"overrides.*more than \d+ patterns"):
        fmt.layers({"a.b": codes}, lambda _: None)
    named = format_of(stored(overrides={f"layers.{i}.up": "W8A16-g32" for i in range(20_000)}))[1]
    assert len(named.layers({f"other.{i}": codes for i in range(2000)}, lambda _: None)) == 2000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 2**31), ("decoder_layers", 10**6), ("num_kv_shared_layers", 2**40), ("moe_num_experts", 2**20),
        ("max_position_embeddings", 10**12), ("rope_theta", float("nan")), ("_attn_implementation", "somebody/kernel"),
        ("quantization_config", "x"),
    ],
)  # fmt: skip
def test_numbers_that_keep_transformers_busy(field: str, value: Any, tmp_path: Path) -> None:
    for config, where in (({field: value}, ""), ({"text_config": {field: value}}, r"text_config\.")):
        with pytest.raises(CheckpointError, match=rf"config\.json: {where}{field}"):
            check_config(config)
    tf.LlamaConfig(hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match=field):
        hf_quant.load(str(tmp_path))


def test_a_model_without_experts_says_zero() -> None:
    check_config({"num_local_experts": 0, "num_experts": 0, "n_routed_experts": 0, "moe_intermediate_size": 0})
    check_config({"time_step_limit": [0.0, float("inf")]})


@pytest.mark.parametrize("text", ["\x1b[31mred", "\u202eabc", "\ud800", "a\0b", "\x07" * 50_000, "x" * 10**6])
def test_messages_are_short_and_printable(text: str) -> None:
    for error in (CheckpointError(f"{text}: bad"), DiskError(28, "full", text), HfQuantError(text)):
        assert len(str(error)) <= LONGEST + 10 and str(error).replace("\n", "").isprintable()
    assert printable("модель 模型 🙂\nnext") == "модель 模型 🙂\nnext"


def test_an_escape_in_config_json_does_not_reach_the_terminal(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, 2)}, tmp_path / WEIGHTS)
    config = {
        "model_type": "llama",
        "quantization_config": stored(format="\x1b[31mred", overrides={"\x1b[2J": "W4A16-g9"}),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for command in ("inspect", "verify", "plan"):
        done = CliRunner().invoke(main, [command, str(tmp_path)])
        assert isinstance(done.exception, SystemExit | None) and "\x1b" not in done.output


# -- fields of wrong types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"hf_quant": "x"}, {"hf_quant": [1]}, {"hf_quant": {"method": 5}}, {"hf_quant": {"method": {}}},
        {"hf_quant": {"share_quantized": "x"}}, {"hf_quant": {"version": "x"}}, {"packing_format": {}, "quant_method": "auto-round"},
        {"quant_method": ["gptq"]}, {"quant_method": None},
    ],
    ids=str,
)  # fmt: skip
def test_fields_of_wrong_types(fields: dict[str, Any]) -> None:
    with pytest.raises(HfQuantError):
        taken_over({"quant_method": "gptq", "bits": 4, "group_size": 32, "hf_quant": {}} | fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"format": "gptq"}, r"format 'gptq'.*convert"), ({"format": "awq"}, "format"), ({"format": ["native"]}, "format"),
        ({"share_quantized": "x"}, "share_quantized"), ({"method": ["rtn"]}, "method"), ({"self": 1}, ""),
    ],
)  # fmt: skip
def test_our_own_config_says_what_cannot_be(fields: dict[str, Any], said: str) -> None:
    if said:
        with pytest.raises(HfQuantError, match=said):
            hf_quant.HfQuantConfig.from_dict(stored(**fields))
    else:
        assert hf_quant.HfQuantConfig.from_dict(stored(**fields)).scheme == "W4A16-g32"


def test_a_native_config_without_a_scheme_means_the_default_one() -> None:
    config = stored(overrides={"b": "W8A16-g32"})
    config.pop("scheme")
    codes = {"weight": torch.zeros(32, 64, dtype=torch.uint8), "weight_scale": torch.ones(32, 1)}
    layers = format_of(config)[1].layers({"a": codes}, lambda _: None)
    assert str(layers["a"].scheme) == str(hf_quant.HfQuantConfig.from_dict(config).default_scheme) == "W4A16-g128"


@pytest.mark.parametrize(
    "name", [["pipeline"], ["set_seed"], ["PreTrainedTokenizerFast"], ["utils"], [None], [["x"]], 5, {"a": 1}]
)
def test_architectures_that_are_no_models(name: Any) -> None:
    config = tf.LlamaConfig()
    config.architectures = name
    with pytest.raises(CheckpointError, match="architectures"):
        class_of(config)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": [1]}, {"hidden_act": "nope"}, {"num_attention_heads": 7}, {"dtype": "os.system"}, {"dtype": 128},
        {"rope_parameters": [1]}, {"tie_word_embeddings": "yes"}, {"text_config": [1]}, {"rms_norm_eps": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_what_transformers_cannot_build_is_said_in_our_words(fields: dict[str, Any], tmp_path: Path) -> None:
    tf.LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
                   architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        hf_quant.load(str(tmp_path))
    done = CliRunner().invoke(main, ["verify", str(tmp_path)])
    assert done.exit_code == 1 and done.stderr.startswith("Error: ")


# -- others -------------------------------------------------------------------------------------------------------


def test_an_index_whose_shards_are_empty(tmp_path: Path) -> None:
    check_weights([])
    save_file({}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"metadata": 1, "weight_map": {"w": "model-00002-of-00002.safetensors"}}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="metadata must be an object"):
        Checkpoint.open(tmp_path)


def test_a_base_in_8_bit_floats_has_no_type_to_quantize_from(tmp_path: Path) -> None:
    model = tf.AutoModelForCausalLM.from_config(
        tf.LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    )
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({name: torch.zeros(32, 32).to(torch.float8_e4m3fn)}, tmp_path / WEIGHTS)
    tensors = Tensors(Checkpoint.of_files([tmp_path / WEIGHTS]), model)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {name} has dtype F8_E4M3"):
        tensors.dtype(name)


def test_a_config_of_the_hub_is_checked_before_transformers_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = ({"model_type": "llama", "num_hidden_layers": 2**31}, {})
    monkeypatch.setattr(tf.PretrainedConfig, "get_config_dict", classmethod(lambda *_, **__: endless))
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        config_of("owner/name")
