"""``optimum-cli hf-quant``: optimum imports whatever lies in this namespace folder each time it starts."""

from __future__ import annotations

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class HfQuantCommand(BaseOptimumCLICommand):
    """The command ``hf-quant``, with all of its own commands and options."""

    COMMAND = CommandInfo("hf-quant", "Quantize models to 8, 4, 3 or 2 bits, and measure, convert and publish them.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Take everything that follows as it is."""
        parser.add_argument("command", help="a command of hf-quant: quantize, eval, convert, ...")
        parser.add_argument("arguments", nargs=REMAINDER, help="its arguments; --help lists them")

    def run(self) -> None:
        """Run the installed command in this process; it ends the process with its own exit status."""
        from importlib.metadata import entry_points

        (command,) = entry_points(group="console_scripts", name="hf-quant")
        command.load()([self.args.command, *self.args.arguments])


REGISTER_COMMANDS = [HfQuantCommand]
