"""Let the packages that defined each format write checkpoints of tiny models; run inside an environment that has them.

    python make_fixtures.py WORK GROUP...      for example: python make_fixtures.py /tmp/w models gptqmodel logits

``shipped`` makes checkpoints of examples/ref-llama-16m with whatever packages the environment has, under WORK/shipped (they
are too large to commit; ``benchmarks/formats.py WORK/shipped`` looks at them); ``shipped logits`` belong together.

``models`` comes first and makes the float models, ``logits`` last, in a process of its own: some packages change how
transformers computes. A fixture is a folder under ``fixtures/``: config.json and model.safetensors as the package wrote
them; expected.json with the packages, their versions, and the SHA-256 of what their own dequantizer gives for every layer;
expected.safetensors with the logits of a float model holding those weights. The tests need none of these packages.

Made with gptqmodel 7.7.0, auto-round 0.16.1, bitsandbytes 0.50.2, compressed-tensors 0.20.0, optimum-quanto 0.2.7,
torchao 0.18.0 and transformers 5.24.0; autoawq 0.2.9 and hqq 0.2.8 with transformers 4.51.3; llm-compressor 0.14.0 with
compressed-tensors 0.19.0 and transformers 5.17.0; ``old`` with compressed-tensors 0.9.4; nvidia-modelopt 0.47.0.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "GPTQMODEL_CPU_WORKERS": "2", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip

import torch
import transformers
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parent / "fixtures"
IDS = torch.arange(1, 17)[None]
SHAPE = {
    "vocab_size": 48,
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WORK = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()


def models():
    """dense: Llama. wide: with more than one block of 128. moe: Qwen3-MoE, whose experts stand apart in the file and stacked in transformers 5. mixtral: likewise.
    gemma: Gemma 4, with embeddings for each layer. oss: gpt-oss, whose experts are stacked in the file too."""
    tf, moe = transformers, SHAPE | {"num_experts_per_tok": 2}
    made = {
        "dense": tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE, intermediate_size=128)),
        "wide": tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE, intermediate_size=384)),
        "moe": tf.Qwen3MoeForCausalLM(
            tf.Qwen3MoeConfig(**moe, intermediate_size=128, moe_intermediate_size=128, num_experts=3)
        ),
        "gemma": tf.Gemma4ForCausalLM(
            tf.Gemma4TextConfig(
                **(SHAPE | {"num_hidden_layers": 2}),
                intermediate_size=128,
                hidden_size_per_layer_input=64,
                vocab_size_per_layer_input=48,
                global_head_dim=32,
                layer_types=["sliding_attention", "full_attention"],
                num_kv_shared_layers=0,
            )
        ),
        "oss": tf.GptOssForCausalLM(
            tf.GptOssConfig(**moe, intermediate_size=128, num_local_experts=3, sliding_window=8)
        ),
        "mixtral": tf.MixtralForCausalLM(tf.MixtralConfig(**moe, intermediate_size=128, num_local_experts=3)),
    }
    for name, model in made.items():
        torch.manual_seed(len(name))
        for parameter in model.parameters():
            if (
                parameter.ndim > 1
            ):  # weights of a trained model's size, with some large columns: act-order shall matter
                parameter.data.normal_(0, 0.08).mul_(1 + 4 * (torch.rand(parameter.shape[-1]) > 0.95))
        model.half().save_pretrained(WORK / name)
        tokenizer().save_pretrained(WORK / name)


def tokenizer():
    """Of 48 words; some packages do not load a model without one."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(48)}, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="w3", pad_token="w0", bos_token="w1", eos_token="w2"
    )


def calibration(rows=16, length=64):
    """Random tokens with unequal frequencies; for the shipped model, its own text."""
    if (WORK / "text.txt").is_file() and FIXTURES.name == "shipped":
        made = transformers.AutoTokenizer.from_pretrained(WORK / "ref")((WORK / "text.txt").read_text()[:100_000])
        return torch.tensor(made.input_ids[: rows * length * 4]).view(rows * 2, length * 2)
    torch.manual_seed(7)
    return torch.multinomial(torch.linspace(4, 1, 45), rows * length, replacement=True).view(rows, length) + 3


def missing(cases):
    """A fixture that is there stays as it is: delete it to have it made anew."""
    return [(name, case) for name, case in cases.items() if not (FIXTURES / name).exists()]


def clean(name):
    """An empty folder for the package to write into."""
    out = WORK / "made" / name
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def keep(name, source, weights, packages, dtype=torch.float16, note=None):
    """Copy what a package wrote, with what its dequantizer gives.

    Args:
        name: Of the fixture.
        source: Folder that the package wrote.
        weights: Layer to dequantized weight ``[N, K]``.
        packages: Names of the packages that made it.
        dtype: What the float model computes in.
        note: Anything worth knowing.
    """
    out = FIXTURES / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    tensors = {}
    for file in sorted(Path(source).glob("*.safetensors")):
        tensors |= load_file(file)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for extra in ("config.json", "quantize_config.json", "quanto_qmap.json", "hf_quant_config.json"):
        if (Path(source) / extra).is_file():
            config = json.loads((Path(source) / extra).read_text())
            (out / extra).write_text(json.dumps(config, indent=1) + "\n")
    layers = {layer: fingerprint(weight) for layer, weight in sorted(weights.items())}
    facts = {"made_by": {p: version(p) for p in (*packages, "transformers", "torch")}, "note": note,
             "dtype": str(dtype).removeprefix("torch."), "layers": layers}  # fmt: skip
    (out / "expected.json").write_text(json.dumps(facts, indent=1) + "\n")
    twin(name, tensors, json.loads((out / "config.json").read_text()), weights, dtype)


def twin(name, tensors, config, weights, dtype):
    """A float checkpoint that holds ``weights`` and the checkpoint's other tensors."""
    dense = {
        n: t for n, t in tensors.items() if n.endswith(".bias") or not any(n.startswith(f"{x}.") for x in weights)
    }
    if config["model_type"] == "gpt_oss":  # stacks, transposed in the model
        dense = {n: t for n, t in dense.items() if not n.endswith(("_blocks", "_scales"))}
        dense |= {stack: weight.to(dtype).mT.contiguous() for stack, weight in weights.items()}
    else:
        dense |= {f"{layer}.weight": weight.detach().cpu().to(dtype).contiguous() for layer, weight in weights.items()}
    config.pop("quantization_config", None)
    if config["model_type"] == "mixtral":  # GPTQModel calls its experts as transformers 5 does
        names = {"mlp.experts": "block_sparse_moe.experts", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
        for ours, theirs in names.items():
            dense = {n.replace(ours, theirs) if "experts" in n else n: tensor for n, tensor in dense.items()}
    folder = WORK / "twins" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": str(dtype).removeprefix("torch.")}))
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})


def fingerprint(weight):
    """Dtype, shape and SHA-256 of the bytes of a weight."""
    raw = (weight.detach().cpu() + 0.0).contiguous()  # no negative zeros
    digest = hashlib.sha256(raw.view(torch.uint8).numpy().tobytes()).hexdigest()
    return {"dtype": str(raw.dtype).removeprefix("torch."), "shape": list(raw.shape), "sha256": digest}


def logits():
    """Those of every twin that was made since, with transformers as it is."""
    for folder in sorted((WORK / "twins").iterdir()):
        if not (FIXTURES / folder.name).is_dir():
            continue
        out, facts = FIXTURES / folder.name, json.loads((FIXTURES / folder.name / "expected.json").read_text())
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, torch_dtype=getattr(torch, facts["dtype"]), attn_implementation="eager", output_loading_info=True
        )
        assert not info["missing_keys"], (folder, info)
        with torch.no_grad():
            save_file({"logits": model(IDS).logits.float()}, out / "expected.safetensors")
        sys.stdout.write(f"{folder.name} {sum(f.stat().st_size for f in out.iterdir()) // 1000} kB\n")


# -- GPTQModel: GPTQ and AWQ ------------------------------------------------------------------------------------------


def gptqmodel():
    """GPTQ in both versions, all widths, with and without zero points and act-order; AWQ's GEMM layout."""
    from gptqmodel.quantization.config import FORMAT

    cases = {
        "gptq-4bit": ("dense", {"bits": 4}),
        "gptq-4bit-asym": ("dense", {"bits": 4, "group_size": 32, "sym": False}),
        "gptq-4bit-act-order": ("dense", {"bits": 4, "group_size": 64, "desc_act": True, "act_group_aware": False}),
        "gptq-4bit-act-order-asym-v2": ("dense", {"bits": 4, "group_size": 32, "desc_act": True, "act_group_aware": False, "sym": False, "format": FORMAT.GPTQ_V2}),
        "gptq-4bit-row": ("dense", {"bits": 4, "group_size": -1, "act_group_aware": False}),
        "gptq-4bit-v2": ("dense", {"bits": 4, "format": FORMAT.GPTQ_V2}),
        "gptq-3bit-asym": ("dense", {"bits": 3, "group_size": 64, "sym": False}),
        "gptq-3bit": ("dense", {"bits": 3}),
        "gptq-2bit-asym-v2": ("dense", {"bits": 2, "group_size": 16, "sym": False, "format": FORMAT.GPTQ_V2}),
        "gptq-8bit-asym": ("dense", {"bits": 8, "sym": False}),
        "gptq-4bit-lm-head": ("dense", {"bits": 4, "lm_head": True}),
        "gptq-mixed": ("dense", {"bits": 4, "dynamic": {"+:.*down_proj": {"bits": 8, "group_size": 64}, "-:.*k_proj": {}}}),
        "gptq-4bit-moe": ("moe", {"bits": 4}),
        "gptq-4bit-act-order-moe": ("moe", {"bits": 4, "group_size": 32, "desc_act": True, "act_group_aware": False}),
        "gptq-4bit-mixtral": ("mixtral", {"bits": 4, "group_size": -1, "act_group_aware": False}),
    }  # fmt: skip
    for name, (model, fields) in missing(cases):
        one_gptqmodel(name, model, fields)
    for name, (model, fields) in missing({"awq-gemm-moe": ("moe", {"bits": 4, "group_size": 64, "awq": True})}):
        one_gptqmodel(name, model, fields)


def one_gptqmodel(name, model, fields):
    """Quantize, save, load again and dequantize with GPTQModel."""
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import AWQConfig

    fields = {"group_size": 128} | fields
    config = (
        AWQConfig(**{k: v for k, v in fields.items() if k != "awq"}) if fields.get("awq") else QuantizeConfig(**fields)
    )
    made = GPTQModel.load(str(WORK / model), config, device="cpu")
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in calibration()]
    out = clean(name)
    made.quantize(rows, batch_size=1)
    made.save(str(out))
    dequantized_gptqmodel(name, out, fields)


def dequantized_gptqmodel(name, out, fields):
    """Load what was written and dequantize it."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    if fields.get("awq"):
        tensors = load_file(out / "model.safetensors")
        layers = [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]
        parts = {n: [tensors[f"{n}.{local}"] for local in ("qweight", "qzeros", "scales")] for n in layers}
        weights = {n: dequantize_gemm(*own, 4, fields["group_size"]).T for n, own in parts.items()}
        keep(name, out, weights, ["gptqmodel"], dtype=torch.bfloat16)
        return
    loaded = GPTQModel.load(str(out), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)  # that of its scales
    weights = {
        n: m.dequantize_weight().T.contiguous()
        for n, m in loaded.model.named_modules()
        if hasattr(m, "qweight") and hasattr(m, "dequantize_weight")
    }
    keep(name, out, weights, ["gptqmodel"])


# -- AutoAWQ ----------------------------------------------------------------------------------------------------------


def autoawq():
    """All three layouts. GEMV's has no dequantizer without a GPU: its weights are those AutoAWQ rounded and packed."""
    cases = {
        "awq-gemm": ("dense", "GEMM", 128),
        "awq-gemv": ("dense", "GEMV", 64),
        "awq-gemv-fast": ("dense", "GEMV_FAST", 64),
        "awq-gemm-mixtral": ("mixtral", "GEMM", 64),
    }
    for name, (model, layout, size) in missing(cases):
        one_autoawq(name, model, layout, size)


def one_autoawq(name, model, layout, size):
    """Quantize with AutoAWQ, and remember what each layer is made of."""
    import awq.quantize.quantizer as awq
    from awq import AutoAWQForCausalLM

    packed = []

    def remembering(original):
        def from_linear(linear, **fields):
            made = original(linear=linear, **fields)
            packed.append((made, linear.weight.data.clone()))
            return made

        return from_linear

    for kind in (awq.WQLinear_GEMM, awq.WQLinear_GEMV, awq.WQLinear_GEMVFast):
        kind.from_linear = staticmethod(remembering(kind.from_linear))
    made = AutoAWQForCausalLM.from_pretrained(str(WORK / model), device_map="cpu", safetensors=True)
    asked = {"zero_point": True, "q_group_size": size, "w_bit": 4, "version": layout}
    made.quantize(tokenizer(), quant_config=asked, calib_data=calibration().tolist(), max_calib_seq_len=128)
    out = clean(name)
    made.save_quantized(str(out))
    weights = {n: next(w for p, w in packed if p is m) for n, m in made.model.named_modules() if hasattr(m, "qweight")}
    keep(name, out, weights, ["autoawq"])


# -- AutoRound --------------------------------------------------------------------------------------------------------


def auto_round():
    """Its own format, which packs like GPTQ or AWQ, and the two it exports to."""
    cases = {
        "auto-round": ("dense", {"bits": 4, "group_size": 128}, "auto_round"),
        "auto-round-3bit-asym": ("dense", {"bits": 3, "group_size": 64, "sym": False}, "auto_round"),
        "auto-round-2bit": ("dense", {"bits": 2, "group_size": 32}, "auto_round"),
        "auto-round-awq": ("dense", {"bits": 4, "group_size": 64, "sym": False}, "auto_round:auto_awq"),
        "auto-round-gptq-export": ("dense", {"bits": 4, "group_size": 64, "sym": False}, "auto_gptq"),
        "auto-round-awq-export": ("dense", {"bits": 4, "group_size": 128}, "auto_awq"),
        "auto-round-moe": ("moe", {"bits": 4, "group_size": 128}, "auto_round"),
    }
    for name, (model, fields, form) in missing(cases):
        one_auto_round(name, model, fields, form)


def one_auto_round(name, model, fields, form):
    """Round a few steps, export, and let its own layers dequantize."""
    from auto_round import AutoRound
    from auto_round.export.export_to_awq.utils import dequantize_gemm

    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in calibration()]
    made = AutoRound(str(WORK / model), tokenizer=tokenizer(), dataset=rows, seqlen=64, nsamples=16, iters=3, device_map="cpu", **fields)  # fmt: skip
    out = clean(name)
    made.quantize_and_save(output_dir=str(out), format=form)
    folder = next(p.parent for p in [*out.glob("config.json"), *out.glob("*/config.json")])
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    layers = [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]
    parts = {n: [tensors[f"{n}.{local}"] for local in ("qweight", "qzeros", "scales")] for n in layers}
    if "awq" in str(config.get("packing_format")) + config["quant_method"]:
        weights = {n: dequantize_gemm(*own, 4, fields["group_size"]).T for n, own in parts.items()}
    else:
        weights = {n: auto_round_weight(own, config, fields) for n, own in parts.items()}
    keep(name, folder, weights, ["auto-round"])


def auto_round_weight(own, config, fields):
    """What a QuantLinear of AutoRound computes with: its product with the unit matrix."""
    v2 = config.get("packing_format") == "auto_round"
    if v2:
        from auto_round_extension.torch.qlinear_torch import QuantLinear
    else:
        from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
    qweight, qzeros, scales = own
    k, n = qweight.shape[0] * 32 // fields["bits"], qweight.shape[1]
    layer = QuantLinear(fields["bits"], fields["group_size"], k, n, bias=False)
    layer.qweight, layer.qzeros, layer.scales = qweight, qzeros, scales
    layer.post_init()
    return layer(torch.eye(k, dtype=torch.float16)).T.contiguous()


# -- bitsandbytes -----------------------------------------------------------------------------------------------------


def bitsandbytes():
    """Through transformers; and experts each for itself, as transformers 4 kept them and Linear4bit writes them."""
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    cases = {
        "bnb-nf4": ("dense", four),
        "bnb-nf4-double": ("dense", four | {"bnb_4bit_use_double_quant": True}),
        "bnb-fp4": ("dense", four | {"bnb_4bit_quant_type": "fp4"}),
        "bnb-nf4-bf16-storage": ("dense", four | {"bnb_4bit_quant_storage": "bfloat16"}),
        "bnb-int8": ("dense", {"load_in_8bit": True}),
        "bnb-nf4-moe": ("moe", four | {"bnb_4bit_use_double_quant": True}),
    }
    for name, (model, fields) in missing(cases):
        one_bitsandbytes(name, model, fields)


def one_bitsandbytes(name, model, fields):
    """Quantize while loading, save, dequantize with bitsandbytes' functions."""
    import bitsandbytes as bnb

    asked = transformers.BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float16, **fields)
    made = transformers.AutoModelForCausalLM.from_pretrained(
        WORK / model, quantization_config=asked, device_map="cpu", dtype=torch.float16
    )
    out = clean(name)
    made.save_pretrained(out)
    weights = {}
    for layer, module in made.named_modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            weights[layer] = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB).half()
        elif isinstance(module, bnb.nn.Linear4bit):
            weights[layer] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    if model == "moe":
        weights |= apart(out, asked)
    keep(name, out, weights, ["bitsandbytes"])


def apart(out, asked):
    """Replace the float experts in a checkpoint by those that Linear4bit writes."""
    import bitsandbytes as bnb

    tensors, weights = load_file(out / "model.safetensors"), {}
    for name in [n for n in tensors if ".experts." in n]:
        weight, layer = tensors.pop(name), name.removesuffix(".weight")
        made = bnb.nn.Linear4bit(
            weight.shape[1], weight.shape[0], bias=False, compress_statistics=True, quant_type="nf4"
        )
        made.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
        made = made.to("cpu")
        if made.weight.quant_state is None:
            made.weight = made.weight._quantize("cpu")
        tensors |= {f"{layer}.{local}": t.contiguous() for local, t in made.state_dict().items()}
        weights[layer] = bnb.functional.dequantize_4bit(made.weight.data, made.weight.quant_state)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return weights


# -- HQQ --------------------------------------------------------------------------------------------------------------


def hqq():
    """Through transformers 4.51, which asks for a GPU that it does not need; version 5 does not write them yet."""
    cases = {
        "hqq-4bit": ("dense", {"nbits": 4, "group_size": 64}),
        "hqq-3bit": ("dense", {"nbits": 3, "group_size": 64}),
        "hqq-2bit": ("dense", {"nbits": 2, "group_size": 16}),
        "hqq-4bit-axis0": ("dense", {"nbits": 4, "group_size": 64, "axis": 0}),
        "hqq-4bit-mixtral": ("mixtral", {"nbits": 4, "group_size": 64}),
    }
    for name, (model, fields) in missing(cases):
        one_hqq(name, model, fields)


def one_hqq(name, model, fields):
    """Quantize while loading, save, dequantize with HQQLinear."""
    from transformers.quantizers.quantizer_hqq import HqqHfQuantizer

    def validate(self, *_args, **_kwargs):
        self.using_multi_gpu, self.torch_dtype = False, torch.float16

    HqqHfQuantizer.validate_environment = validate
    asked = transformers.HqqConfig(**{"axis": 1} | fields)
    made = transformers.AutoModelForCausalLM.from_pretrained(
        WORK / model, quantization_config=asked, torch_dtype=torch.float16
    )
    out = clean(name)
    made.save_pretrained(out)
    weights = {n: hqq_weight(m) for n, m in made.named_modules() if type(m).__name__ == "HQQLinear"}
    keep(name, out, weights, ["hqq"], dtype=torch.float32)


def hqq_weight(module):
    """In float32: in float16 HQQ rounds twice, after the subtraction too."""
    from hqq.core.quantize import Quantizer

    wide = {"compute_dtype": torch.float32, "scale": module.meta["scale"].float(), "zero": module.meta["zero"].float()}
    return Quantizer.dequantize(module.W_q, module.meta | wide)


# -- compressed-tensors -----------------------------------------------------------------------------------------------


def llmcompressor():
    """Through llm-compressor: packed, integers and floats; columns reordered for GPTQ only while it ran."""
    token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    static = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    float8 = {"num_bits": 8, "type": "float", "symmetric": True}
    cases = {
        "ct-4bit": ("dense", {"num_bits": 4, "strategy": "group", "group_size": 128}, None),
        "ct-4bit-asym": ("dense", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, None),
        "ct-3bit": ("dense", {"num_bits": 3, "strategy": "group", "group_size": 64}, None),
        "ct-3bit-asym": ("dense", {"num_bits": 3, "strategy": "group", "group_size": 64, "symmetric": False}, None),
        "ct-2bit-asym": ("dense", {"num_bits": 2, "strategy": "group", "group_size": 32, "symmetric": False}, None),
        "ct-w8a8": ("dense", {"num_bits": 8, "strategy": "channel"}, token),
        "ct-w8a8-tensor": ("dense", {"num_bits": 8, "strategy": "tensor"}, static),
        "ct-w8a8-asym": ("dense", {"num_bits": 8, "strategy": "channel", "symmetric": False}, token),
        "ct-fp8-tensor": ("dense", float8 | {"strategy": "tensor"}, float8 | {"strategy": "tensor", "dynamic": False}),
        "ct-fp8-block": ("dense", float8 | {"strategy": "block", "block_structure": [64, 64]}, float8 | {"strategy": "token", "dynamic": True}),
        "ct-4bit-moe": ("moe", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, None),
        "ct-w8a8-moe": ("moe", {"num_bits": 8, "strategy": "channel"}, token),
    }  # fmt: skip
    for name, (model, weights, activations) in missing(cases):
        one_llmcompressor(name, model, weights, activations)


def one_llmcompressor(name, model, weights, activations):
    """Quantize, save compressed, decompress with compressed-tensors."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    group = {
        "targets": ["Linear"],
        "weights": {"type": "int", "symmetric": True} | weights,
        "input_activations": activations,
    }
    modifier = GPTQModifier if "actorder" in weights else QuantizationModifier
    recipe = modifier(config_groups={"group_0": group}, ignore=["lm_head", "re:.*mlp.gate$"])
    ids = calibration()
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    made = transformers.AutoModelForCausalLM.from_pretrained(WORK / model, dtype=torch.float16)
    out = clean(name)
    oneshot(model=made, dataset=data, recipe=recipe, max_seq_length=64, num_calibration_samples=16)
    made.save_pretrained(out, save_compressed=True)
    keep(name, out, decompressed(out), ["llmcompressor", "compressed-tensors"])


def decompressed(folder):
    """Every layer, as compressed-tensors itself gives it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    tensors = load_file(folder / "model.safetensors")
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    (scheme,) = config.config_groups.values()
    layers = [n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")]
    made = {}
    for layer in layers:
        own = {n[len(layer) + 1 :]: t for n, t in tensors.items() if n.startswith(f"{layer}.")}
        made[layer] = BaseCompressor.get_value_from_registry(scheme.format).decompress(own, scheme)["weight"]
    return made


def old():
    """Layouts that compressed-tensors 0.9.4 wrote: codes that cross no word, zero points one a byte, columns reordered."""
    cases = {
        "ct-3bit-old": {"num_bits": 3, "strategy": "group", "group_size": 64},
        "ct-4bit-act-order": {"num_bits": 4, "strategy": "group", "group_size": 32, "actorder": "group"},
        "ct-naive-4bit": {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False},
    }
    for name, fields in missing(cases):
        one_old(name, fields)


def one_old(name, fields):
    """Scales by the package's own function, then its compressor and decompressor, one layer after the other."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**{"type": "int", "symmetric": True} | fields)
    form = "naive-quantized" if "naive" in name else "pack-quantized"
    config = QuantizationConfig(config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=args)},
                                format=form, quantization_status="compressed", ignore=["lm_head"])  # fmt: skip
    compressor = BaseCompressor.load_from_registry(form, config=config)
    tensors, weights = load_file(WORK / "dense" / "model.safetensors"), {}
    for full in [n for n in tensors if n.endswith("_proj.weight")]:
        layer, weight = full.removesuffix(".weight"), tensors.pop(full)
        groups = weight.shape[1] // args.group_size
        g_idx = torch.arange(weight.shape[1]) // args.group_size
        if fields.get("actorder"):
            g_idx = g_idx[torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(3))]
        split = weight[:, torch.argsort(g_idx, stable=True)].unflatten(1, (groups, -1))
        scale, zero = calculate_qparams(split.amin(-1), split.amax(-1), args)
        own = compressor.compress_weight(weight=weight, scale=scale.half(), zero_point=zero, quantization_args=args,
                                         g_idx=g_idx if fields.get("actorder") else None)  # fmt: skip
        own["weight_scale"] = scale.half()
        if fields.get("actorder"):
            own["weight_g_idx"] = g_idx.int()
        if not args.symmetric:
            own["weight_zero_point"] = zero
        weights[layer] = compressor.decompress_weight(own, args)
        tensors |= {f"{layer}.{local}": t.contiguous() for local, t in own.items()}
    out = clean(name)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    made = json.loads((WORK / "dense" / "config.json").read_text())
    stored = config.model_dump(mode="json") if hasattr(config, "model_dump") else json.loads(config.json())
    made["quantization_config"] = stored | {"quant_method": "compressed-tensors"}
    (out / "config.json").write_text(json.dumps(made))
    keep(name, out, weights, ["compressed-tensors"])


# -- optimum-quanto and torchao ---------------------------------------------------------------------------------------


def quanto():
    """8 bits; its 4 bits subtract a real number after scaling, which is another formula."""
    from optimum.quanto import QuantizedModelForCausalLM, qint8

    for name, kind in missing({"quanto-int8": qint8}):
        model = transformers.AutoModelForCausalLM.from_pretrained(WORK / "dense", dtype=torch.float16)
        made, out = QuantizedModelForCausalLM.quantize(model, weights=kind, exclude="lm_head"), clean(name)
        made.save_pretrained(str(out))
        weights = {
            n: m.weight.dequantize() for n, m in model.named_modules() if hasattr(m, "weight_qtype") and m.weight_qtype
        }
        keep(name, out, weights, ["optimum-quanto"])


def torchao():
    """Its plain integer tensors."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    cases = {
        "torchao-int8": Int8WeightOnlyConfig(),
        "torchao-int4-unpacked": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    }
    for name, kind in missing(cases):
        made = transformers.AutoModelForCausalLM.from_pretrained(
            WORK / "dense", dtype=torch.float16, quantization_config=transformers.TorchAoConfig(kind)
        )
        out = clean(name)
        made.save_pretrained(out)
        weights = {
            n: m.weight.dequantize() for n, m in made.named_modules() if hasattr(getattr(m, "weight", None), "qdata")
        }
        keep(name, out, weights, ["torchao"])


def modelopt():
    """8-bit and 4-bit floats, and integers; some layers with a factor for each column."""
    cases = {
        "modelopt-fp8": ("dense", "FP8_DEFAULT_CFG"),
        "modelopt-fp8-row": ("dense", "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
        "modelopt-fp8-block": ("wide", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"),
        "modelopt-mxfp8": ("dense", "MXFP8_DEFAULT_CFG"),
        "modelopt-nvfp4": ("dense", "NVFP4_DEFAULT_CFG"),
        "modelopt-nvfp4-moe": ("moe", "NVFP4_DEFAULT_CFG"),
        "modelopt-nvfp4-fp8-inputs": ("dense", "W4A8_NVFP4_FP8_CFG"),
        "modelopt-mxfp4": ("dense", "MXFP4_DEFAULT_CFG"),
        "modelopt-int8": ("dense", "INT8_DEFAULT_CFG"),
        "modelopt-int8-smoothquant": ("dense", "INT8_SMOOTHQUANT_CFG"),
        "modelopt-int4-awq": ("wide", "INT4_AWQ_CFG"),
    }
    for name, (model, config) in missing(cases):
        one_modelopt(name, model, config)


def one_modelopt(name, model, config):
    """Quantize and export with ModelOpt; its caches of keys and values in 8-bit floats too, where it has 8-bit floats."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    made, out = transformers.AutoModelForCausalLM.from_pretrained(WORK / model, dtype=torch.bfloat16), clean(name)
    fields = getattr(mtq, config)
    if config == "FP8_DEFAULT_CFG":
        fields = fields | {"quant_cfg": [*fields["quant_cfg"], *mtq.FP8_KV_CFG["quant_cfg"]]}
    mtq.quantize(made, fields, lambda quantized: [quantized(ids[None]) for ids in calibration()])
    export_hf_checkpoint(made, export_dir=str(out))
    tensors = load_file(out / "model.safetensors")
    layers = sorted(key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale"))
    weights = {layer: modelopt_weight(tensors, layer).bfloat16() for layer in layers}
    keep(name, out, weights, ["nvidia-modelopt"], torch.bfloat16)


def modelopt_weight(tensors, layer):
    """What ModelOpt's own tensors give in float32; 4-bit integers, for which it has a packer alone, are packed again by that."""
    from modelopt.torch.export.quant_utils import from_quantized_weight, pack_int4_in_uint8
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor

    weight, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"]
    (n, k), wide = weight.shape, torch.float32
    columns = tensors.get(f"{layer}.pre_quant_scale", torch.ones(k)).float()
    if weight.dtype == torch.int8:
        return from_quantized_weight(weight, scale, "int8_sq", wide) * columns
    if weight.dtype == torch.float8_e4m3fn:
        if scale.dtype == torch.uint8:
            return MXFP8QTensor((n, k), wide, weight).dequantize(wide, scale=scale)
        if scale.ndim == 0:
            return from_quantized_weight(weight, scale, "fp8", wide)
        blocks = {-1: k} if scale.ndim == 1 else {-1: 128, -2: 128}
        grid = scale.reshape(-1, k // blocks[-1])
        return FP8QTensor((n, k), wide, weight).dequantize(wide, scale=grid, block_sizes=blocks)
    if scale.dtype == torch.uint8:
        return MXFP4QTensor((n, 2 * k), wide, weight).dequantize(
            wide, scale=scale.reshape(-1, 1), block_sizes={-1: 32}
        )
    if scale.dtype == torch.float8_e4m3fn:
        whole, size = tensors[f"{layer}.weight_scale_2"], 2 * k // scale.shape[1]
        return NVFP4QTensor((n, 2 * k), wide, weight).dequantize(
            wide, scale=scale, double_scale=whole, block_sizes={-1: size}
        )
    nibbles = torch.stack([weight & 15, weight >> 4], 1).flatten(0, 1).to(torch.int8)
    dense = torch.where(nibbles > 7, nibbles - 16, nibbles) * scale.float().repeat_interleave(k // scale.shape[1], 1)
    assert torch.equal(pack_int4_in_uint8(dense, scale.float(), k // scale.shape[1]), weight)
    return dense * columns


def floats():
    """4-bit floats and integers of rare widths by compressed-tensors; blocks of 8-bit floats and ternary weights as transformers has them."""
    cases = {
        "ct-mxfp4": {
            "num_bits": 4,
            "type": "float",
            "strategy": "group",
            "group_size": 32,
            "scale_dtype": "torch.uint8",
        },
        "ct-nvfp4": {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn",
        },
        "ct-5bit": {"num_bits": 5, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
        "ct-6bit-asym": {"num_bits": 6, "type": "int", "strategy": "group", "group_size": 64, "symmetric": False},
        "ct-7bit": {"num_bits": 7, "type": "int", "strategy": "channel", "symmetric": True},
    }
    for name, weights in missing(cases):
        one_compressed(name, weights)
    for name, make in missing({"mxfp4-moe": mxfp4_experts, "gemma-mobile": gemma_mobile}):
        make(name)
    for name, one in missing({"fp8-block": one_fp8, "bitnet": one_bitnet}):
        made = transformers.AutoModelForCausalLM.from_pretrained(WORK / "dense", dtype=torch.float16)
        out = clean(name)
        made.save_pretrained(out)
        tensors, weights = load_file(out / "model.safetensors"), {}
        for layer, module in made.named_modules():
            if type(module) is torch.nn.Linear and layer != "lm_head":
                stored, weights[layer] = one(module.weight.detach())
                del tensors[f"{layer}.weight"]
                tensors |= {f"{layer}.{local}": tensor for local, tensor in stored.items()}
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((out / "config.json").read_text())
        kind = {
            "fp8-block": transformers.FineGrainedFP8Config(weight_block_size=[64, 64]),
            "bitnet": transformers.BitNetQuantConfig(),
        }[name]
        config["quantization_config"] = json.loads(kind.to_json_string(use_diff=False))
        (out / "config.json").write_text(json.dumps(config))
        keep(name, out, weights, [])


def gemma_mobile(name):
    """Packed as transformers unpacks it; its own layers multiply out. Patterns as in the checkpoints of Gemma 4 for mobile devices."""
    from transformers.integrations.gemma_quant import QuantizedEmbedding, QuantizedLinear

    made = transformers.AutoModelForCausalLM.from_pretrained(WORK / "gemma", dtype=torch.float32)
    out = clean(name)
    made.save_pretrained(out)
    patterns = {r"^lm_head$": 2, r"model\.embed_tokens$": 2, r"model\.embed_tokens_per_layer$": 4, r"layers\.(0|1[0-4])\.mlp\.": 4,
                r"layers\.\d+\.mlp\.": 2, r"layers\.\d+\.per_layer_(input_gate|projection)$": 8, r"layers\.\d+\.self_attn\.": 4}  # fmt: skip
    tensors, weights, largest = load_file(out / "model.safetensors"), {}, {}
    for layer, module in made.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, x, layer=layer: largest.update({layer: x[0].detach().abs().max()})
            )
    made(IDS)
    for layer, module in made.named_modules():
        table = isinstance(module, torch.nn.Embedding)
        if layer == "model.per_layer_model_projection" or not (table or type(module) is torch.nn.Linear):
            continue
        bits = next(b for p, b in patterns.items() if re.search(p, layer))
        weight = module.weight.detach()
        n, k = weight.shape
        groups = weight.unflatten(-1, (2 if "per_layer" in layer and table else 1, -1))
        scale = groups.abs().amax(-1) / (2 ** (bits - 1) - 0.5)
        codes = (groups / scale[..., None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).flatten(1)
        packed = codes.to(torch.int8)
        if bits < 8:
            parts = (codes + 2 ** (bits - 1)).to(torch.uint8).unflatten(-1, (-1, 8 // bits))
            packed = sum(parts[..., i] << (bits * i) for i in range(8 // bits)).to(torch.uint8)
        tensors.pop(f"{layer}.weight", None)
        if table:
            own = QuantizedEmbedding(n, k, torch.float32, num_bits=bits)
            weights[layer] = own._dequantize_weights(packed, scale)
            tensors |= {f"{layer}.embedding_quantized": packed, f"{layer}.embedding_scale": scale}
        else:
            own = QuantizedLinear(k, n, num_bits=bits)
            own.weight.data, own.weight_scale.data = packed, scale
            weights[layer] = own._dequantize_weights().detach()
            ranges = torch.tensor(0.0) if "o_proj" in layer else largest[layer] / 100  # zero: not calibrated
            tensors |= {f"{layer}.weight": packed, f"{layer}.weight_scale": scale, f"{layer}.input_activation_scale": ranges,
                        f"{layer}.output_activation_scale": torch.tensor(0.0)}  # fmt: skip
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    kind = transformers.utils.quantization_config.GemmaQuantizationConfig(
        quantize_embeddings=True, module_quant_configs={p: {"num_bits": b} for p, b in patterns.items()},
        modules_to_not_convert=["model.per_layer_model_projection"],
    )  # fmt: skip
    config["quantization_config"] = json.loads(kind.to_json_string(use_diff=False))
    (out / "config.json").write_text(json.dumps(config))
    keep(name, out, weights, [], dtype=torch.float32)


def mxfp4_experts(name):
    """Stacks of gpt-oss: codes of any value and scales of a usual size, multiplied out by transformers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    made = transformers.AutoModelForCausalLM.from_pretrained(WORK / "oss", dtype=torch.bfloat16)
    out = clean(name)
    made.save_pretrained(out)
    tensors, weights = load_file(out / "model.safetensors"), {}
    torch.manual_seed(0)
    for stack in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        e, k, n = tensors.pop(stack).shape
        blocks = torch.randint(0, 256, (e, n, k // 32, 16), dtype=torch.uint8)
        scales = torch.randint(119, 123, (e, n, k // 32), dtype=torch.uint8)
        tensors |= {f"{stack}_blocks": blocks, f"{stack}_scales": scales}
        weights[stack] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).mT
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = json.loads(
        transformers.Mxfp4Config(modules_to_not_convert=left).to_json_string(use_diff=False)
    )
    (out / "config.json").write_text(json.dumps(config))
    keep(name, out, weights, [], dtype=torch.bfloat16)


def one_compressed(name, weights):
    """Scales by the package's own functions, then its compressor and decompressor, one layer after the other."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    floats = {32: "mxfp4-pack-quantized", 16: "nvfp4-pack-quantized"}
    kind = floats[weights["group_size"]] if weights["type"] == "float" else "pack-quantized"
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights, "format": kind})
    made = transformers.AutoModelForCausalLM.from_pretrained(WORK / "dense", dtype=torch.float16)
    out = clean(name)
    made.save_pretrained(out)
    tensors, dense, compressor = load_file(out / "model.safetensors"), {}, BaseCompressor.get_value_from_registry(kind)
    for layer, module in made.named_modules():
        if type(module) is torch.nn.Linear and layer != "lm_head":
            weight = module.weight.detach().float()
            groups = weight.unflatten(-1, (-1, weights.get("group_size", weight.shape[-1])))
            whole = generate_gparam(weight.amin(), weight.amax()).reshape(1) if "nvfp4" in kind else None
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights, global_scale=whole)
            state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
            if weights.get("symmetric", True):
                del state["weight_zero_point"]
            state |= {} if whole is None else {"weight_global_scale": whole}
            stored = compressor.compress(state, scheme)
            dense[layer] = compressor.decompress(stored, scheme)["weight"].detach()
            del tensors[f"{layer}.weight"]
            tensors |= {f"{layer}.{local}": tensor.detach().contiguous() for local, tensor in stored.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    group = json.loads(scheme.model_dump_json())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    keep(
        name, out, dense, ["compressed-tensors"], dtype=torch.bfloat16 if weights["type"] == "float" else torch.float16
    )


def one_fp8(weight):
    """Blocks of 64 x 64, multiplied out by transformers' own conversion."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    blocks = weight.float().unflatten(0, (-1, 64)).unflatten(-1, (-1, 64))
    scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    stored = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
    dense = Fp8Dequantize(None)._dequantize_one(stored, scale, torch.float32)
    return {"weight": stored, "weight_scale_inv": scale}, dense


def one_bitnet(weight):
    """Ternary weights, packed and unpacked by transformers."""
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    scale = 1 / weight.float().abs().mean()
    packed = pack_weights((weight.float() * scale).round().clamp(-1, 1))
    return {"weight": packed, "weight_scale": scale.reshape(1)}, unpack_weights(packed, torch.float32) / scale


# -- the shipped model ------------------------------------------------------------------------------------------------


def shipped():
    """The trained model of this repository through every package that is here."""
    import importlib.util

    global FIXTURES
    FIXTURES = WORK / "shipped"
    example = Path(__file__).parents[2] / "examples" / "ref-llama-16m"
    shutil.copytree(example, WORK / "ref", dirs_exist_ok=True)
    shutil.copyfile(example / "calibration.txt", WORK / "text.txt")
    has, is_old = importlib.util.find_spec, transformers.__version__.startswith("4.")
    if is_old:
        described = json.loads((WORK / "ref" / "tokenizer_config.json").read_text())
        described["tokenizer_class"] = "PreTrainedTokenizerFast"
        (WORK / "ref" / "tokenizer_config.json").write_text(json.dumps(described))
    cases = {
        "gptq-4bit": ("gptqmodel", lambda n: one_gptqmodel(n, "ref", {"bits": 4})),
        "gptq-4bit-act-order": ("gptqmodel", lambda n: one_gptqmodel(n, "ref", {"bits": 4, "desc_act": True, "act_group_aware": False})),
        "gptq-3bit-asym": ("gptqmodel", lambda n: one_gptqmodel(n, "ref", {"bits": 3, "sym": False})),
        "awq-gemm": ("awq", lambda n: one_autoawq(n, "ref", "GEMM", 128)),
        "auto-round": ("auto_round", lambda n: one_auto_round(n, "ref", {"bits": 4, "group_size": 128}, "auto_round")),
        "bnb-nf4-double": ("bitsandbytes", lambda n: one_bitsandbytes(n, "ref", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True})),
        "bnb-int8": ("bitsandbytes", lambda n: one_bitsandbytes(n, "ref", {"load_in_8bit": True})),
        "hqq-4bit": ("hqq", lambda n: one_hqq(n, "ref", {"nbits": 4, "group_size": 64})),
        "ct-4bit": ("llmcompressor", lambda n: one_llmcompressor(n, "ref", {"num_bits": 4, "strategy": "group", "group_size": 128}, None)),
        "ct-w8a8": ("llmcompressor", lambda n: one_llmcompressor(n, "ref", {"num_bits": 8, "strategy": "channel"}, {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True})),
    }  # fmt: skip
    for name, (package, make) in missing(cases):
        if has(package) is not None and (package in ("awq", "hqq")) == is_old:
            make(name)


GROUPS = {
    "shipped": shipped,
    "models": models, "gptqmodel": gptqmodel, "autoawq": autoawq, "auto_round": auto_round, "bitsandbytes": bitsandbytes,
    "hqq": hqq, "llmcompressor": llmcompressor, "old": old, "quanto": quanto, "torchao": torchao, "modelopt": modelopt,
    "floats": floats, "logits": logits,
}  # fmt: skip

if __name__ == "__main__":
    for group in sys.argv[2:]:
        GROUPS[group]()
