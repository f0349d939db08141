"""The frame of `misa-bench` and `misa-eval`: one subcommand for each tool, one line for each error."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from misa_vllm.bench.report import BenchmarkError
from misa_vllm.settings import MISAConfigError


@dataclass(frozen=True)
class Command:
    """A program whose subcommands are modules with `add_arguments(parser)` and `run(args)`.

    `run` returns the exit code (None: 0) and raises BenchmarkError or MISAConfigError, one line that says what to
    change, where the tool cannot run: exit code 2.
    """

    name: str
    summary: str
    tools: dict[str, tuple[str, str]]
    """Name -> (module, what it measures)."""

    def parser(self, chosen: str | None = None) -> argparse.ArgumentParser:
        """The command line; only the tool `chosen` is imported and has its arguments."""
        result = argparse.ArgumentParser(prog=self.name, description=self.summary)
        commands = result.add_subparsers(dest="tool", required=True)
        for name, (module_name, summary) in self.tools.items():
            if name != chosen:
                commands.add_parser(name, help=summary)
                continue
            module = importlib.import_module(module_name)
            command = commands.add_parser(name, help=summary, description=module.__doc__)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
        return result

    def main(self, arguments: Sequence[str] | None = None) -> int:
        arguments = sys.argv[1:] if arguments is None else list(arguments)
        args = self.parser(arguments[0] if arguments else None).parse_args(arguments)
        try:
            return args.run(args) or 0
        except (BenchmarkError, MISAConfigError) as error:
            print(f"{self.name}: error: {error}", file=sys.stderr)
            return 2
