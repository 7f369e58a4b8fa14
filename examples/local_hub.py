"""A Hub on this machine, to try publishing: the client works as with huggingface.co, and nothing leaves the machine.

python examples/local_hub.py [FOLDER]      # runs until Ctrl-C, and prints what to type in another shell
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "hub"))
from fakehub import FakeHub  # what the tests of uploads use

TOKEN = "hf_" + "tryingtryingtryingtrying"


def start(folder: str | Path | None = None) -> FakeHub:
    """Start it and point this process to it. Call it before huggingface_hub or transformers is imported."""
    hub = FakeHub(Path(folder or tempfile.mkdtemp())).__enter__()
    hub.add_token(TOKEN, "me")
    os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    return hub


if __name__ == "__main__":
    running = start(*sys.argv[1:2])
    print('A Hub runs here until Ctrl-C; you are logged in as "me". In another shell:\n')
    print(f"export HF_ENDPOINT={running.url} HF_TOKEN={TOKEN} HF_HUB_OFFLINE=0")
    print("hf-quant push FOLDER me/NAME --yes", flush=True)
    try:
        running.closing.wait()
    except KeyboardInterrupt:
        running.__exit__()
