"""Make the pictures of the documentation again: commands in a terminal of 80 columns, the report, and a model card.

python benchmarks/pictures.py [doctor] [quantize] [ladder] [report] [card]      # without a name: all of them

Commands run on the model that ships, and what they print is kept as SVG in docs/pictures. The pictures of the report and of
the card are taken by a headless Chromium, from the facts that model_cards.py has measured.
"""

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from card_html import page
from PIL import Image
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

from hf_quant.publish.page import html_page

ROOT = Path(__file__).parents[1]
TERMINALS, CARDS = ROOT / "docs" / "pictures", ROOT / "model_cards"
SHOWN = CARDS / "ref-llama-16m-mixed"  # it has a ladder, and thus all that a report shows
BASE = "examples/ref-llama-16m"
COLUMNS = 80
COMMANDS = {
    "doctor": "hf-quant doctor",
    "quantize": f"hf-quant quantize {BASE} --scheme W8A16-g128 --scheme W4A16-g128 -o out",
    "ladder": f"hf-quant ladder {BASE} --method rtn --max-kl 0.02 --max-tokens 4096 --context 128 --trial-tokens 128 -o out",
}
PAGES = {
    "desktop": (1100, 3150, False),
    "dark": (1100, 3150, True),
    "phone": (390, 3500, False),
}
SVG = re.sub(r"@font-face \{\{.*?\n    \}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)  # which would be fetched


def terminal(name: str) -> None:
    """Run a command and keep what it leaves on the screen, bars aside."""
    command = COMMANDS[name]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "examples").symlink_to(ROOT / "examples")
        shown = typed(f"{sys.executable} -m hf_quant.cli {command.removeprefix('hf-quant ')}".split(), folder)
    screen = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    screen.print(Text(f"$ {command}"))
    screen.print(Text.from_ansi(shown))
    screen.save_svg(str(TERMINALS / f"{name}.svg"), title="hf-quant", code_format=SVG)


def typed(command: list[str], folder: str) -> str:
    """What a command prints in a terminal."""
    ours, theirs = pty.openpty()
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    running = subprocess.Popen(command, cwd=folder, env=os.environ | quiet, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    printed = b""
    while chunk := read(ours):
        printed += chunk
    if running.wait():
        sys.exit(printed.decode())
    return printed.decode().replace("\r\n", "\n").strip()


def read(terminal: int) -> bytes:
    """The next piece; empty at the end, which Linux reports as an error."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


def report() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, record in json.loads((SHOWN / "facts.json").read_text()).items():
            (Path(folder) / f"{name}.json").write_text(json.dumps(record))
        html = html_page(Path(folder))
    for kind, (width, height, dark) in PAGES.items():
        photograph(html, SHOWN / f"report-{kind}.png", width, height, dark)


def photograph(html: str, picture: Path, width: int, height: int, dark: bool = False) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("these pictures are taken by Chromium: install it, for example by apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "page.html").write_text(html, encoding="utf-8")
        frame = f'<body style="margin:0"><iframe src="page.html" style="width:{width}px;height:{height}px;border:0">'
        (Path(folder) / "frame.html").write_text(frame)  # windows have a least width, frames have none
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/browser",
        ]
        options += ["--blink-settings=preferredColorScheme=0"] if dark else []
        options += [f"--window-size={width},{height}", f"--screenshot={picture}", f"file://{folder}/frame.html"]
        subprocess.run([browser, *options], check=True, capture_output=True, timeout=300)
    Image.open(picture).convert("RGB").quantize(256).save(picture, optimize=True)  # half the bytes
    print(picture)


if __name__ == "__main__":
    for name in sys.argv[1:] or [*COMMANDS, "report", "card"]:
        if name == "report":
            report()
        elif name == "card":
            photograph(page(SHOWN), CARDS / "card.png", 900, 1290)
        else:
            terminal(name)
