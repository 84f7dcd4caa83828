#!/usr/bin/env bash
# Starts a prefill server, a decode server and a router, and asks the same prompts of the router and of the
# prefill server alone: the greedy text and so the score must be the same for each. From the environment, with
# defaults: NUM_PROMPTS, and what run_multi_connector_edge_case_test.sh takes.
set -euo pipefail
cd "$(dirname "$0")/../.."

NUM_PAGES=${NUM_PAGES:-257}
source tests/e2e/pair.sh
start_pair

"$PYTHON" tests/e2e/accuracy.py --alone "$prefill_url" --pair "$router_url" --decode "$decode_url" \
    --prompts "${NUM_PROMPTS:-120}"
