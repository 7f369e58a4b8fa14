"""What is meant by a command or an option that does not exist: a typing error, or another program's word for the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from hf_quant.errors import suggestion

EXTRA = "Got unexpected extra argument"  # click's own words
ITSELF = "it alone, without an option before it"
COMMANDS = {  # of other programs
    "quantise": "quantize", "compress": "quantize", "oneshot": "quantize", "prune": "quantize", "evaluate": "eval",
    "measure": "eval", "perplexity": "eval", "ppl": "eval", "benchmark": "bench", "speed": "bench", "export": "convert",
    "repack": "convert", "dequantize": "convert", "upload": "push", "publish": "push", "env": "doctor", "info": "inspect",
    "show": "inspect", "check": "verify", "validate": "verify", "finetune": "train", "fine-tune": "train", "qat": "train",
    "estimate": "plan", "dry-run": "plan", "search": "ladder", "mixed": "ladder", "compare": "report",
}  # fmt: skip
OPTIONS = {
    "--output-dir": "-o FOLDER", "--out": "-o FOLDER", "--output-path": "-o FOLDER", "--save-dir": "-o FOLDER",
    "--save-path": "-o FOLDER", "--model": ITSELF, "--model-id": ITSELF, "--model-name-or-path": ITSELF, "--repo-id": ITSELF,
    "--wbits": "--bits", "--w-bit": "--bits", "--nbits": "--bits", "--weight-bits": "--bits", "--q-bits": "--bits",
    "--bnb-4bit-quant-type": "--scheme W4A16-g64", "--bnb-4bit-use-double-quant": "--scheme W4A16-g64",
    "--bnb-4bit-compute-dtype": "--dtype", "--compute-dtype": "--dtype", "--llm-int8-threshold": "--scheme W8A8-threshold",
    "--llm-int8-skip-modules": "--ignore", "--int4": "--scheme W4A16-g128", "--int8": "--scheme W8A16-g128",
    "--quant-type": "--scheme", "--gptq": "--method gptq", "--awq": "--method awq", "--act-order": "--method gptq",
    "--load-in-4bit": "--bits 4", "--load-in-8bit": "--bits 8", "--weight-format": "--scheme", "--quant-method": "--method",
    "--quantization": "--scheme", "--q-group-size": "--group-size", "--groupsize": "--group-size", "--symmetric": "--sym",
    "--zero-point": "--asym", "--asymmetric": "--asym", "--desc-act": "--method gptq",
    "--torch-dtype": "--dtype", "--device-map": "--device", "--iters": "--epochs", "--nsamples": "--calibration-tokens",
    "--num-samples": "--calibration-tokens", "--seqlen": "--context", "--max-length": "--context", "--calib-data": "--calibration",
    "--skip-modules": "--ignore", "--modules-to-not-convert": "--ignore", "--exclude": "--ignore", "--force": "--overwrite",
    "--push-to-hub": "the command hf-quant push", "--upload-repo": "the command hf-quant push",
    "--dry-run": "the command hf-quant plan", "--token": "HF_TOKEN=... before the command",
    "--cache-dir": "HF_HOME=FOLDER before the command", "--cuda": "--device cuda", "--gpu": "--device cuda", "--cpu": "--device cpu",
    "--hf-path": ITSELF, "--model-path": ITSELF, "--mlx-path": "-o FOLDER", "--outfile": "-o FOLDER", "--outdir": "-o FOLDER",
    "--imatrix": "--calibration", "--tensor-parallel-size": "--tp", "--max-model-len": "--context", "--kv-cache-dtype": "--kv-cache",
    "--outtype": "--to gguf", "--format": "--to",
    "--batch-size": "--batch", "--reference": "--base", "--threshold": "--max-kl", "--verbose": "HF_QUANT_DEBUG=1 before the command",
}  # fmt: skip


class Group(click.Group):
    """A group of commands that says which one was meant."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchOption:
            raise
        except click.UsageError:
            raise click.UsageError(_no_command(args[0], self.list_commands(ctx)), ctx) from None


def _no_command(name: str, known: Sequence[str]) -> str:
    word = name.lower().replace("_", "-")
    listed = ", ".join(known)
    if Path(name).exists() or "/" in name:
        return f"{name!r} is no command; before it, say what to do with it: {listed}"
    if word in ("help", "version"):
        return f"No such command {name!r}; did you mean --{word}?"
    hint = f"; did you mean {COMMANDS[word]}?" if COMMANDS.get(word) in known else suggestion(word, known)
    return f"No such command {name!r}{hint or f'; there is {listed}'}"


def explain(error: click.ClickException) -> None:
    """Complete the message of wrong usage: what was probably meant, or what is missing."""
    if isinstance(error, click.NoSuchOption):
        error.possibilities = None  # type: ignore[misc]
        error.message = _no_option(error)  # type: ignore[misc]  # final for those who only catch it
    elif isinstance(error, click.MissingParameter) and error.param is not None:
        error.message = _missing(error.param)  # type: ignore[misc]
    elif isinstance(error, click.UsageError) and error.message.startswith(EXTRA):
        error.message += "; a name with spaces needs quotation marks, and every option its hyphens"  # type: ignore[misc]


def _missing(param: click.Parameter) -> str:
    if not isinstance(param, click.Option):
        return str(getattr(param.type, "what", ""))
    return f"Add {param.opts[0]} {param.metavar or param.human_readable_name.upper()}: {param.help}"


def _no_option(error: click.NoSuchOption) -> str:
    known = (
        {name for param in error.ctx.command.params for name in (*param.opts, *param.secondary_opts)}
        if error.ctx
        else set()
    )
    if error.ctx is not None and isinstance(error.ctx.command, Group):
        return f"No such option: {error.option_name}; begin with a command: {', '.join(error.ctx.command.list_commands(error.ctx))}"
    word = error.option_name.lower().replace("_", "-")
    equivalent = OPTIONS.get(word)
    if equivalent is not None and (not equivalent.startswith("-") or equivalent.split()[0] in known):
        return f"No such option: {error.option_name}; did you mean {equivalent}?"
    all_of_them = f"; {error.ctx.command_path} --help lists them" if error.ctx else ""
    return f"No such option: {error.option_name}{suggestion(word, known) or all_of_them}"
