#!/usr/bin/env bash
# Asks a server started by `make serve`: examples/serve_curl.sh [URL]
set -euo pipefail
url=${1:-http://127.0.0.1:8000}
model=$(curl -fsS "$url/v1/models" | python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')

echo "completion:"
curl -fsS "$url/v1/completions" -H 'Content-Type: application/json' \
    -d "{\"model\": \"$model\", \"prompt\": \"We the People\", \"max_tokens\": 16}"
echo
echo "streamed chat:"
curl -fsSN "$url/v1/chat/completions" -H 'Content-Type: application/json' \
    -d "{\"model\": \"$model\", \"max_tokens\": 8, \"stream\": true,
         \"messages\": [{\"role\": \"user\", \"content\": \"Who votes?\"}]}"
echo "what the indexer did:"
curl -fsS "$url/metrics" | grep '^misa:'
