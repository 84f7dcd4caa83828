#!/usr/bin/env bash
# Starts a prefill server, a decode server and a router on real ports, and runs test_multi_connector_edge_cases.py
# against them. Exit status: that of pytest. From the environment, with defaults:
#   PYTHON, PAGE_SIZE, PREFILL_PORT, DECODE_PORT, ROUTER_PORT, SIDE_CHANNEL_PORT,
#   HOST_TIER (SimpleCPUOffloadConnector or OffloadingConnector), NUM_PAGES, HOST_BYTES, START_S, LOG_DIR
set -euo pipefail
cd "$(dirname "$0")/../.."

source tests/e2e/pair.sh
start_pair

PREFILL_URL=$prefill_url DECODE_URL=$decode_url ROUTER_URL=$router_url \
    "$PYTHON" -m pytest -q -p no:cacheprovider tests/e2e/test_multi_connector_edge_cases.py "$@"
