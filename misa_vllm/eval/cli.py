"""`misa-eval NAME`: what MISA keeps of DSA on a checkpoint."""

import os
import sys
from collections.abc import Sequence

from misa_vllm.command import Command

COMMAND = Command(
    "misa-eval",
    "What MISA keeps of DSA on a checkpoint",
    {
        "recall": ("misa_vllm.eval.recall", "share of exact DSA's tokens and attention mass, layer by layer"),
        "niah": ("misa_vllm.eval.niah", "needles in a haystack: retrieval over length and depth"),
        "longbench": ("misa_vllm.eval.longbench", "LongBench from a local data folder, all policies in one table"),
    },
)
parser = COMMAND.parser


def main(arguments: Sequence[str] | None = None) -> int:
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # the results alone go to stdout
    return COMMAND.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
