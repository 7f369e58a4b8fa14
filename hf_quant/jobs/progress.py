"""How a long job tells of itself: bars and messages, shown only where the caller asks for them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

Bar = Callable[[Iterable[Any], str], Iterable[Any]]
Say = Callable[[str], None]
Stage = Callable[[str], AbstractContextManager[None]]
SILENT, TICK = 2.0, 1.0  # seconds before a stage without a bar is shown, and between two of its signs of life


class Important(str):
    """A message that the commands say with ``--quiet``, too."""


@dataclass(frozen=True)
class Reporter:
    """Where a job's progress and messages go.

    Attributes:
        bar: Wraps the items that a job walks through, given what they are, such as ``"blocks"``.
        say: Is told what is worth knowing.
        stage: A context for a step that has no items, given what it is, such as ``"saving"``.
    """

    bar: Bar
    say: Say
    stage: Stage

    def over(self, what: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
        """`bar` for one kind of items."""
        return lambda items: self.bar(items, what)


@contextmanager
def reporting(progress: bool | Bar, say: Say | None) -> Iterator[Reporter]:
    """Report as the caller wishes; the bars of transformers and of the Hub's client are shown only if ours are.

    Args:
        progress: True for bars in the terminal or notebook, False for none, or a function of its own as in `Reporter`.
        say: As in `Reporter`; None passes messages to the logger ``hf_quant``, at level INFO.
    """
    import logging

    bar = progress if callable(progress) else _bars if progress else _no_bars
    with their_bars(shown=progress is True):
        yield Reporter(bar, say or logging.getLogger("hf_quant").info, ticking if progress is True else unshown)


def peak_memory() -> int:
    """The most bytes that this process has had in memory so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _no_bars(items: Iterable[Any], what: str) -> Iterable[Any]:
    return items


def _bars(items: Iterable[Any], what: str) -> Iterable[Any]:
    from tqdm.auto import tqdm

    with tqdm(items, desc=what) as bar:
        for item in bar:
            yield item
            if what == "blocks":
                bar.set_postfix_str(f"peak {peak_memory() / 1e9:.1f} GB")


@contextmanager
def unshown(_what: str) -> Iterator[None]:
    """A stage that nobody watches."""
    yield


@contextmanager
def ticking(what: str) -> Iterator[None]:
    """Show what is being done, for how long, and the memory, if it takes more than two seconds."""
    done = threading.Event()
    thread = threading.Thread(target=_tick, args=(what, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _tick(what: str, done: threading.Event) -> None:
    from tqdm.auto import tqdm

    if done.wait(SILENT):
        return
    with tqdm(desc=what, bar_format="{desc}: {elapsed}{postfix}", leave=False) as bar:
        while not done.wait(TICK):
            bar.set_postfix_str(f"peak {peak_memory() / 1e9:.1f} GB")


@contextmanager
def their_bars(*, shown: bool) -> Iterator[None]:
    """Show the bars of transformers and of the Hub's client, or none of them."""
    from transformers.utils import logging as theirs

    if shown or not theirs.is_progress_bar_enabled():
        yield
        return
    theirs.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        theirs.enable_progress_bar()  # type: ignore[no-untyped-call]
