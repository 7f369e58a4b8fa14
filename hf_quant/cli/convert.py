"""``hf-quant convert``: the same codes in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hf_quant.cli._common import emit, output_options, say, table
from hf_quant.cli._types import Model
from hf_quant.jobs.outputs import check_output

KINDS = ("native", "compressed-tensors", "gptq", "awq", "dense")


@click.command()
@click.argument("folder", type=Model())
@click.option("--to", required=True, type=click.Choice(KINDS), help="What to write; dense: floating point.")
@click.option("-o", "--output", required=True, help="Folder of the result.")
@click.option(
    "--target", type=click.Choice(["vllm"]), help="Refuse what this engine cannot run, and say which kernel will."
)
@click.option("--tp", default=1, show_default=True, help="GPUs that the engine splits each layer over.")
@click.option("--overwrite", is_flag=True, help="Replace the folder if it exists.")
@output_options
def command(
    folder: str, to: str, output: str, target: str | None, tp: int, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    """Write the quantized checkpoint in FOLDER in another format, without rounding anything again.

    Every layer is read back from disk and compared before the result appears.
    """
    check_output(Path(output), [folder], overwrite=overwrite)

    from tqdm import tqdm

    from hf_quant.cli._common import bars
    from hf_quant.jobs.convert import convert

    if tp != 1 and target is None:
        raise click.UsageError("--tp says how --target splits the layers: name a --target")
    shown = bars(quiet or as_json)
    done = convert(
        Path(folder), to, Path(output), target=target, tp=tp, overwrite=overwrite,
        progress=lambda files: tqdm(files, desc="files", disable=not shown), say=say,
    )  # fmt: skip
    record: dict[str, Any] = {
        "from": done.source, "to": to, "folder": output, "layers": done.layers,
        "bytes_before": done.bytes_before, "bytes_after": done.bytes_after, "identical": True,
    }  # fmt: skip
    if done.verdict is not None:
        record |= {"target": target, "tp": tp, "kernels": done.verdict.kernels}
        say("\n".join(f"{target}: {line}" for line in done.verdict.lines()), quiet or as_json)
    human = table(("field", "value"), [(name, str(value)) for name, value in record.items()])
    emit(as_json, quiet, record=record, essential=output, human=human)


COMMAND = command
