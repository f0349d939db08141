"""`misa-bench NAME`: the project's benchmarks. A benchmark is a module with `add_arguments(parser)` and `run(args)`.

`run` returns the exit code (None: 0) and raises `BenchmarkError` where the benchmark cannot run, which is exit code 2.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from misa_vllm.bench.report import BenchmarkError

BENCHMARKS = {
    "indexer": ("misa_vllm.bench.indexer", "indexer step on the CPU: policy misa against dsa and the reference"),
    "kernels": ("misa_vllm.bench.kernels", "indexer kernels on a GPU: stage by stage, against stock vLLM's"),
    "serve-shapes": ("misa_vllm.bench.serve_shapes", "engines on a GPU: first token and decode speed, stock and misa"),
}
"""Name -> (module, what it measures)."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="misa-bench", description=__doc__.partition(".")[0])
    commands = result.add_subparsers(dest="benchmark", required=True)
    for name, (module_name, summary) in BENCHMARKS.items():
        module = importlib.import_module(module_name)
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        return args.run(args) or 0
    except BenchmarkError as error:
        print(f"misa-bench: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
