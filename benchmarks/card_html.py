"""A card as one HTML page, about as the Hub shows it (which hides the metadata), to look at or to take a picture of.

python benchmarks/card_html.py model_cards/NAME > card.html && chromium --headless --screenshot=card.png card.html
"""

import base64
import re
import sys
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = """
body { max-width: 52rem; margin: 1.5rem auto; padding: 0 1.5rem; font: 16px/1.6 system-ui, "DejaVu Sans", sans-serif; color: #1f2937; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2rem; border-bottom: 1px solid #e5e7eb; padding-bottom: .3rem; }
table { border-collapse: collapse; font-size: .86rem; display: block; overflow-x: auto; }
th, td { border: 1px solid #e5e7eb; padding: .35rem .7rem; text-align: left; } th { background: #f9fafb; }
code { background: #f3f4f6; border-radius: .25rem; padding: .1rem .3rem; font-size: .85em; overflow-wrap: anywhere; }
pre { background: #f3f4f6; border-radius: .5rem; padding: .9rem; overflow-x: auto; } pre code { padding: 0; }
img { max-width: 100%; } sub { color: #6b7280; }
"""


def page(folder: Path) -> str:
    _, _, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)

    def inlined(match: re.Match[str]) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((folder / match[1]).read_bytes()).decode()}"'

    html = re.sub(r'src="(assets/[\w.]+)"', inlined, html)
    return f'<!doctype html><meta charset="utf-8"><style>{STYLE}</style>{html}'


if __name__ == "__main__":
    print(page(Path(sys.argv[1])))
