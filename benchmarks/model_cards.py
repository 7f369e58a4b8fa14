"""Make the models whose cards are in model_cards/ from the model that ships, measure them, and write their cards.

python benchmarks/model_cards.py [NAME...]

In model_cards/NAME: facts.json (recipe and results as they were measured), README.md written from it, and its pictures.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASE, CARDS = ROOT / "examples" / "ref-llama-16m", ROOT / "model_cards"
MODELS = {
    "ref-llama-16m-W8A16-rtn": ["quantize", "--scheme", "W8A16-g128", "--method", "rtn", "--max-kl", "0.001"],
    "ref-llama-16m-W4A16-gptq": ["quantize", "--scheme", "W4A16-g128", "--method", "gptq", "--max-kl", "0.02"],
    "ref-llama-16m-mixed": ["ladder", "--max-kl", "0.02"],
}


def run(command: str, *arguments: object) -> None:
    print("hf-quant", command, *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "hf_quant.cli", command, *map(str, arguments)], check=True)


def write(made: Path, out: Path) -> None:
    """Facts and card; of the machine, only what bears on the speed."""
    recipe, results = (json.loads((made / f"{name}.json").read_text()) for name in ("recipe", "results"))
    if recipe["calibration"]:
        del recipe["calibration"]["paragraphs"]
    del results["bench"]["machine"]["system"]
    for name, record in (("recipe", recipe), ("results", results)):
        (made / f"{name}.json").write_text(json.dumps(record))
    run("card", "build", made)
    out.mkdir(exist_ok=True)
    (out / "facts.json").write_text(json.dumps({"recipe": recipe, "results": results}, indent=1) + "\n")
    shutil.copy(made / "README.md", out)
    shutil.rmtree(out / "assets", ignore_errors=True)
    shutil.copytree(made / "assets", out / "assets")
    for picture in made.glob("sensitivity-*.png"):
        shutil.copy(picture, out)


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / name
            command, *options = MODELS[name]
            run(command, BASE, "-o", made, *options)
            run("bench", made, "--base", BASE)
            write(made, CARDS / name)
