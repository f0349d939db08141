"""`misa-bench NAME`: the project's benchmarks."""

import sys

from misa_vllm.command import Command

COMMAND = Command(
    "misa-bench",
    "The project's benchmarks",
    {
        "indexer": ("misa_vllm.bench.indexer", "indexer step on the CPU: policy misa against dsa and the reference"),
        "kernels": ("misa_vllm.bench.kernels", "indexer kernels on a GPU: stage by stage, against stock vLLM's"),
        "serve-shapes": (
            "misa_vllm.bench.serve_shapes",
            "engines on a GPU: first token and decode speed, stock and misa",
        ),
        "vllm": ("misa_vllm.bench.vllm_bench", "vLLM's own benchmarks of your model, stock and misa"),
    },
)
parser, main = COMMAND.parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
