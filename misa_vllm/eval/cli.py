"""`misa-eval NAME`: what MISA keeps of DSA on a checkpoint.

A tool is a module with `add_arguments(parser)` and `run(args)`. `run` returns the exit code (None: 0) and raises
`EvalError` where the tool cannot run, which is exit code 2.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from misa_vllm.bench.report import BenchmarkError
from misa_vllm.settings import MISAConfigError

TOOLS = {
    "recall": ("misa_vllm.eval.recall", "share of exact DSA's tokens and attention mass, layer by layer"),
    "niah": ("misa_vllm.eval.niah", "needles in a haystack: retrieval over length and depth"),
    "longbench": ("misa_vllm.eval.longbench", "LongBench from a local data folder, all policies in one table"),
}
"""Name -> (module, what it measures)."""


def parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The command line; only the tool `chosen` is imported and has its arguments."""
    result = argparse.ArgumentParser(prog="misa-eval", description=__doc__.partition(": ")[2].partition(".")[0])
    commands = result.add_subparsers(dest="tool", required=True)
    for name, (module_name, summary) in TOOLS.items():
        if name != chosen:
            commands.add_parser(name, help=summary)
            continue
        module = importlib.import_module(module_name)
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # the results alone go to stdout
    args = parser(arguments[0] if arguments else None).parse_args(arguments)
    try:
        return args.run(args) or 0
    except (BenchmarkError, MISAConfigError) as error:
        print(f"misa-eval: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
