"""The documentation: its code runs, the README is short, and the site is built without a warning."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.fakehub import FakeHub

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "examples" / "ref-llama-16m"
TOKEN = "hf_" + "tryingtryingtryingtrying"
PAGES = (  # what a page makes, a later one uses
    "docs/index.md", "README.md", "docs/tutorials/quantize.md", "docs/guides/convert.md", "docs/tutorials/community.md",
    "docs/tutorials/lora.md", "docs/tutorials/serve.md", "docs/tutorials/publish.md", "docs/guides/calibrate.md",
    "docs/guides/activations.md", "docs/guides/train.md", "docs/tutorials/ladder.md", "docs/guides/shell.md",
)  # fmt: skip
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# One process a page, since importing torch takes longer than most blocks.
RUN = """
import json, shlex, sys
from hf_quant.cli import main
for number, (kind, text) in enumerate(json.load(sys.stdin), 1):
    print(f"block {number}:\\n{text}", file=sys.stderr)
    if kind == "python":
        exec(compile(text, f"block {number}", "exec"), {"__name__": "__main__"})
    for line in text.replace("\\\\\\n", " ").splitlines() if kind == "bash" else []:
        assert not main(shlex.split(line)[1:], standalone_mode=False), line
"""


def blocks(page: str) -> list[tuple[str, str]]:
    """Kind and text of the blocks of a page that a reader runs; installing is left to the environment."""
    found = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    return [(kind, text) for kind, text in found if "pip install" not in text]


def test_every_page_with_code_is_run() -> None:
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")} | {"README.md"}
    assert {page for page in pages if blocks(page)} == set(PAGES)


def examples(folder: Path) -> Path:
    """The shipped model in a folder of its own, with less text, so that measuring takes seconds."""
    model = folder / "examples" / SHIPPED.name
    shutil.copytree(SHIPPED, model)
    for text, length in (("heldout.txt", 500), ("calibration.txt", 1500)):
        documents = (SHIPPED / text).read_text(encoding="utf-8").split("<|endoftext|>")
        (model / text).write_text("<|endoftext|>".join(part[:length] for part in documents[:24]), encoding="utf-8")
    for name in ("examples/local_hub.py", "tests/hub/fakehub.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder / "examples"


@pytest.mark.slow
def test_every_block_runs(tmp_path: Path) -> None:
    examples(tmp_path)
    with FakeHub(tmp_path / "hub") as hub:
        hub.add_token(TOKEN, "me")
        online = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        for page in PAGES:
            given, command = json.dumps(blocks(page)), [sys.executable, "-c", RUN]
            env = online if page == "docs/tutorials/publish.md" else None
            done = subprocess.run(
                command, cwd=tmp_path, input=given, capture_output=True, text=True, check=False, env=env
            )
            assert done.returncode == 0, f"{page}: {done.stdout[-2000:]}{done.stderr[-6000:]}"
        assert hub.files("me/my-model-W8A16")["README.md"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of Jupyter's packages
@pytest.mark.parametrize("notebook", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks(notebook: Path, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    place = {"metadata": {"path": str(examples(tmp_path))}}
    nbclient.NotebookClient(nbformat.read(notebook, 4), timeout=600, resources=place).execute()


def test_the_readme_is_short() -> None:
    words = len((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert words <= 1200, f"README.md has {words} words"


def test_links_lead_somewhere() -> None:
    """In the repository itself, where pages are read too."""
    missing = []
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        links = re.findall(
            r"\]\(([^)#:]+)(?:#[^)]*)?\)|(?:src|href|srcset)=\"([^\":#]+)\"", page.read_text(encoding="utf-8")
        )
        missing += [
            (page, link) for pair in links for link in pair if link and not page.parent.joinpath(link).exists()
        ]
    assert not missing


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "llms.txt").is_file() and (tmp_path / "reference" / "commands" / "index.html").is_file()
