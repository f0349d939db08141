#!/usr/bin/env bash
# Load on a server started by `make serve`: examples/bench_serve.sh [PORT] [MODEL] [more options of vllm bench serve]
set -euo pipefail
cd "$(dirname "$0")/.."
port=${1:-8000} model=${2:-.models/trained}
shift $(($# < 2 ? $# : 2))
"${VENV:-.venv}/bin/vllm" bench serve --port "$port" --model "$model" --tokenizer "$model" \
    --dataset-name random --random-input-len 4096 --random-output-len 64 --num-prompts 8 --max-concurrency 4 "$@"
