# To be sourced: start_pair starts a prefill server, a decode server and a router, and sets prefill_url,
# decode_url and router_url. At the shell's exit these three processes are ended, and no others.

PYTHON=${PYTHON:-.venv/bin/python}
PAGE_SIZE=${PAGE_SIZE:-16}
NUM_PAGES=${NUM_PAGES:-49}
HOST_TIER=${HOST_TIER:-SimpleCPUOffloadConnector}
# 256 pages of f32 KV.
HOST_BYTES=${HOST_BYTES:-$((256 * PAGE_SIZE * 46080))}
PREFILL_PORT=${PREFILL_PORT:-8100}
DECODE_PORT=${DECODE_PORT:-8200}
ROUTER_PORT=${ROUTER_PORT:-8192}
SIDE_CHANNEL_PORT=${SIDE_CHANNEL_PORT:-5600}
START_S=${START_S:-240}

pids=()
made_logs=
if [ -z "${LOG_DIR:-}" ]; then
    LOG_DIR=$(mktemp -d)
    made_logs=$LOG_DIR
fi

end_children() {
    local status=$? pid
    trap - EXIT
    for pid in "${pids[@]}"; do
        kill -TERM "$pid" 2>/dev/null || true
    done
    for pid in "${pids[@]}"; do
        wait "$pid" || true
    done
    if [ "$status" -ne 0 ]; then
        tail -n 20 "$LOG_DIR"/*.log >&2 || true
    fi
    if [ -n "$made_logs" ]; then
        rm -rf -- "$made_logs"
    fi
    exit "$status"
}

# start_child NAME ARGUMENTS...: `jaxserve ARGUMENTS` in the background.
start_child() {
    local name=$1
    shift
    "$PYTHON" -m jaxserve "$@" >"$LOG_DIR/$name.log" 2>&1 &
    pids+=("$!")
}

# wait_ready URL PID NAME: until the server answers, or an error once its process has ended or START_S is over.
wait_ready() {
    local url=$1 pid=$2 name=$3 deadline=$((SECONDS + START_S))
    until "$PYTHON" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' \
        "$url/ready" 2>/dev/null; do
        if ! kill -0 "$pid" 2>/dev/null || [ "$SECONDS" -ge "$deadline" ]; then
            echo "error: the $name server is not ready on $url" >&2
            return 1
        fi
        sleep 0.5
    done
}

start_pair() {
    trap end_children EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    local host="127.0.0.1"
    prefill_url=http://$host:$PREFILL_PORT
    decode_url=http://$host:$DECODE_PORT
    router_url=http://$host:$ROUTER_PORT
    local tier='{"kv_connector":"'$HOST_TIER'","kv_role":"kv_both","kv_connector_extra_config":{"cpu_bytes_to_use":'$HOST_BYTES'}}'
    local producer='{"kv_connector":"NixlConnector","kv_role":"kv_producer"}'
    local consumer='{"kv_connector":"NixlConnector","kv_role":"kv_consumer"}'
    local prefill_config='{"kv_connector":"MultiConnector","kv_role":"kv_producer","kv_connector_extra_config":{"connectors":['$producer,$tier']}}'
    local decode_config='{"kv_connector":"MultiConnector","kv_role":"kv_consumer","kv_connector_extra_config":{"connectors":['$consumer,$tier']}}'
    local flags=(
        --enforce-eager --dtype float32 --disable-log-stats
        --max-num-seqs 8 --max-num-batched-tokens 128
        --page-size "$PAGE_SIZE" --num-gpu-blocks-override "$NUM_PAGES"
    )
    export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
    start_child prefill serve smollm2 --port "$PREFILL_PORT" "${flags[@]}" \
        --nixl-side-channel-port "$SIDE_CHANNEL_PORT" --kv-transfer-config "$prefill_config"
    start_child decode serve smollm2 --port "$DECODE_PORT" "${flags[@]}" --kv-transfer-config "$decode_config"
    wait_ready "$prefill_url" "${pids[0]}" prefill
    wait_ready "$decode_url" "${pids[1]}" decode
    start_child router router --port "$ROUTER_PORT" --prefill "$prefill_url" --decode "$decode_url" \
        --health-timeout 60
    wait_ready "$router_url" "${pids[2]}" router
}
