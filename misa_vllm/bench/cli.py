"""`misa-bench NAME`: the project's benchmarks. A benchmark is a module with `add_arguments(parser)` and `run(args)`."""

import argparse
import importlib

BENCHMARKS = {
    "indexer": ("misa_vllm.bench.indexer", "indexer step on the CPU: policy misa against dsa and the reference"),
}
"""Name -> (module, what it measures)."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="misa-bench", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, (module_name, summary) in BENCHMARKS.items():
        module = importlib.import_module(module_name)
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
