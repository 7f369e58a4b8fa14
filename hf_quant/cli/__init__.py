"""The command ``hf-quant``: one file a command. Results go to stdout, everything else to stderr.

Exit codes: 0 ok, 1 error, 2 wrong usage, 3 a quality gate was missed, 130 stopped by Ctrl-C, 143 by SIGTERM.
HF_QUANT_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from hf_quant import __version__, _plugins
from hf_quant.cli._words import Group, explain
from hf_quant.errors import GateError, HfQuantError, OptionError, PlanError, SchemeError, printable


class _Commands(Group):
    """Imports a command when it is asked for: ``--help`` needs no torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return _plugins.names("cli")

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _plugins.names("cli"):
            return None
        command: click.Command = _plugins.load("cli", cmd_name).COMMAND
        return command

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _escaped():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _stoppable(), _escaped():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except (SchemeError, PlanError, OptionError) as error:
            _report(error, 2)
        except GateError as error:
            _report(error, 3)
        except (HfQuantError, OSError, ValueError) as error:
            _report(error, 1)
        except KeyboardInterrupt as stop:
            number = stop.number if isinstance(stop, _Stopped) else signal.SIGINT
            click.echo(f"Stopped by {number.name}", err=True)
            sys.exit(128 + number)
        except BaseException as error:
            from hf_quant.disk.memory import exhausted

            if (shortage := exhausted(error)) is None:
                raise
            _report(HfQuantError(shortage), 1)


class _Stopped(KeyboardInterrupt):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM unwind the running command, so that temporary files and locks are removed; a second signal ends the process."""

    def stop(number: int, _frame: Any) -> None:
        for signal_number in before:
            signal.signal(signal_number, signal.SIG_DFL)
        raise _Stopped(number)

    before: dict[signal.Signals, Any] = {}
    with suppress(ValueError):  # not in the main thread
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signal_number) is not signal.SIG_IGN:  # nohup and the like
                before[signal_number] = signal.signal(signal_number, stop)
    try:
        yield
    finally:
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)


@contextmanager
def _escaped() -> Iterator[None]:
    """Wrong usage is reported by click, which repeats the input unescaped and does not say what was meant."""
    try:
        yield
    except click.ClickException as error:
        explain(error)
        error.message = printable(error.message)  # type: ignore[misc]  # final for those who only catch it
        raise


def _report(error: Exception, code: int) -> None:
    if os.environ.get("HF_QUANT_DEBUG") == "1":
        traceback.print_exc()
    click.echo(f"Error: {printable(str(error))}", err=True)
    sys.exit(code)


def _hyphens(name: str) -> str:
    """Of commands and options: ``--trust_remote_code`` is ``--trust-remote-code``."""
    return name.replace("_", "-")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": _hyphens})
@click.version_option(__version__, prog_name="hf-quant")
def main() -> None:
    """Make a Hugging Face model several times smaller, and measure what that cost."""
