"""Convert every quantized model in a folder for another engine. One that cannot be converted is named, and the others go on.

python examples/batch_convert.py MODELS OUT [FORMAT [ENGINE]]      # for example: ... models out gptq vllm
"""

import sys
from pathlib import Path

import hf_quant as hq


def main(models: Path, out: Path, to: str = "compressed-tensors", target: str | None = None) -> int:
    """Number of models that could not be converted."""
    failed = 0
    for config in sorted(models.glob("*/config.json")):
        model = config.parent
        if (out / model.name).exists():
            print(f"{model.name}: there already")
            continue
        try:
            print(hq.convert(model, out / model.name, to=to, target=target))
        except hq.HfQuantError as error:
            print(f"{model.name}: {error}")
            failed += 1
    return failed


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]) > 0)
