#!/bin/sh
# Stream a run of the app:   sh api_curl.sh [http://127.0.0.1:7860] [steps]
set -eu
url="${1:-http://127.0.0.1:7860}"
steps="${2:-50}"

# 1. Queue the run; the answer is {"event_id": "..."}.
event_id=$(curl -sS --fail-with-body "$url/gradio_api/call/v2/generate" \
  -H "Content-Type: application/json" \
  -d "{\"prompt\": \"a red mushroom with a white stem\", \"seed\": 7, \"steps\": $steps}" |
  sed 's/.*"event_id": *"\([^"]*\)".*/\1/')

# 2. Follow it: server-sent events, the last one holds the arms' scores and the URLs of all files.
curl -sSN --fail "$url/gradio_api/call/generate/$event_id"
