#!/usr/bin/env bash
# Throughput without a server, exact DSA beside MISA: examples/bench_throughput.sh [MODEL] [more options]
set -euo pipefail
cd "$(dirname "$0")/.."
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} # GiB; on CPU vLLM otherwise asks for 92% of the memory
model=${1:-.models/trained}
shift $(($# < 1 ? $# : 1))
if [[ $model == .models/* ]]; then set -- --tokenizer-mode hf --max-model-len 8192 "$@"; fi
if [[ $model == .models/* && ! -e /dev/nvidia0 ]]; then set -- --dtype float32 "$@"; fi
for policy in dsa misa; do
    echo "policy $policy"
    "${VENV:-.venv}/bin/vllm" bench throughput --model "$model" --attention-backend misa \
        --additional-config "{\"misa\": {\"policy\": \"$policy\"}}" \
        --dataset-name random --random-input-len 4096 --random-output-len 32 --num-prompts 4 "$@"
done
