#!/usr/bin/env bash
# The main job, end to end, each step the command a user would type. Called by `make quickstart`.
set -euo pipefail
cd "$(dirname "$0")/../.."

: "${RAY_PORT:=6379}" "${DASHBOARD_PORT:=8265}" "${SERVE_PORT:=8000}"
dashboard="http://127.0.0.1:$DASHBOARD_PORT"
endpoint="http://127.0.0.1:$SERVE_PORT"
export RAY_API_SERVER_ADDRESS="$dashboard"    # where `ray job submit` goes

step() { printf '\n\033[1m━━ %s\033[0m\n' "$1"; }
run() { printf '\033[2m$ %s\033[0m\n' "$*"; "$@"; }

step "1/4  Ray on this machine, on loopback only"
run python -m llama_ray.local start --port "$RAY_PORT" --dashboard-port "$DASHBOARD_PORT"

step "2/4  Text → tokens (Ray Data)"
run ray job submit -- jobs/quickstart/prepare.yaml

step "3/4  Tokens → model (Ray Train, tensor parallel over two workers)"
run ray job submit -- jobs/quickstart/pretrain.yaml

step "4/4  Model → endpoint (Ray Serve)"
run ray job submit -- python3 -m serve.deploy serve/config.yaml "http_options.port=$SERVE_PORT"
run python -m serve.demo --url "$endpoint"

step "It runs on until \`make stop\`. What to try next"
cat <<EOF
  complete      curl $endpoint/v1/completions -H 'Content-Type: application/json' \\
                  -d '{"model": "quickstart", "prompt": "import os\n\ndef ", "max_tokens": 64}'
  look          dashboard      $dashboard
                loss curve     ${LLAMA_RAY_STORAGE#file://}/runs/quickstart/loss.png
  train longer  .venv/bin/ray job submit --address $dashboard -- jobs/quickstart/pretrain.yaml \\
                  name=longer train.steps=2000 parallel.cpus_per_worker=0.5
  your text     .venv/bin/ray job submit --address $dashboard -- jobs/prepare_llama.yaml \\
                  corpus.path=/your/texts
EOF
