"""Make the models whose cards are in model_cards/ from the model that ships, measure them, and write their cards.

python benchmarks/model_cards.py [--render] [NAME...]     # --render: only write the cards again, from the facts that are there

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
    "ref-llama-16m-W8A8-calibrated": ["quantize", "--scheme", "W8A8", "--method", "calibrated", "--max-kl", "0.001"],
    "ref-llama-16m-W2A16-calibrated": [
        "quantize", "--scheme", "W2A16-g64-asym", "--method", "calibrated", "--max-kl", "0.1",
    ],
    "ref-llama-16m-W2A16-learned": ["quantize", "--scheme", "W2A16-g64-asym", "--method", "learned", "--max-kl", "0.1"],
    "ref-llama-16m-mixed": ["ladder", "--method", "rtn", "--max-kl", "0.02"],
}  # fmt: skip


def run(command: str, *arguments: object) -> None:
    print("hf-quant", command, *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "hf_quant.cli", command, *map(str, arguments)], check=True)


def measure(name: str, made: Path) -> None:
    """Make the model; what is kept of its facts is what the card needs, and of the machine what bears on the speed."""
    command, *options = MODELS[name]
    run(command, BASE, "-o", made, *options)
    run("bench", made, "--base", BASE)
    recipe, results = (json.loads((made / f"{name}.json").read_text()) for name in ("recipe", "results"))
    if recipe["calibration"]:
        del recipe["calibration"]["paragraphs"]
    del results["bench"]["machine"]["system"]
    (CARDS / name).mkdir(exist_ok=True)
    (CARDS / name / "facts.json").write_text(json.dumps({"recipe": recipe, "results": results}, indent=1) + "\n")
    for picture in made.glob("sensitivity-*.png"):
        shutil.copy(picture, CARDS / name)


def render(name: str, made: Path) -> None:
    """Write the card and its pictures from the facts."""
    made.mkdir(exist_ok=True)
    for kind, record in json.loads((CARDS / name / "facts.json").read_text()).items():
        (made / f"{kind}.json").write_text(json.dumps(record))
    run("card", "build", made)
    shutil.copy(made / "README.md", CARDS / name)
    shutil.rmtree(CARDS / name / "assets", ignore_errors=True)
    shutil.copytree(made / "assets", CARDS / name / "assets")


if __name__ == "__main__":
    again = sys.argv[1:2] == ["--render"]
    for name in sys.argv[1 + again :] or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            if not again:
                measure(name, Path(folder) / name)
            render(name, Path(folder) / name)
