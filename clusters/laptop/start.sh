#!/usr/bin/env bash
# A Ray cluster on this machine: a head and more nodes, each a process of its own, behind a token.
#
#   ACERAY_CLUSTER  folder of its token, process ids and logs     (~/.aceray/laptop)
#   WORKERS         nodes beside the head                         (2)
#   CPUS            cores that each node offers                   (1)
#   PORT, DASHBOARD_PORT                                          (6379, 8265)
#   RAY_TMPDIR      where Ray keeps its sessions, a short path    (/tmp/ray)
set -euo pipefail

folder=${ACERAY_CLUSTER:-$HOME/.aceray/laptop}
workers=${WORKERS:-2} cpus=${CPUS:-1} port=${PORT:-6379} dashboard=${DASHBOARD_PORT:-8265}
address=127.0.0.1:$port

if [[ -s $folder/pids ]]; then
    echo "error: $folder: a cluster was started here; stop it first (clusters/laptop/stop.sh)" >&2
    exit 2
fi
mkdir -p "$folder"
chmod 700 "$folder"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token RAY_USAGE_STATS_ENABLED=0
# a busy machine takes longer than Ray's 30 and 60 s
export RAY_raylet_start_wait_time_s=120 RAY_DASHBOARD_STARTUP_TIMEOUT_S=240
if [[ ! -s $RAY_AUTH_TOKEN_PATH ]]; then
    (umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32))' >"$RAY_AUTH_TOKEN_PATH")
fi

# A process group of its own for each node, so that the terminal's Ctrl-C and stop.sh mean the right ones. Ports are
# free ones: several nodes share this machine.
start_node() {
    local name=$1
    shift
    setsid ray start --block --num-cpus="$cpus" --min-worker-port=0 --max-worker-port=0 \
        --dashboard-agent-listen-port=0 --disable-usage-stats "$@" >"$folder/$name.log" 2>&1 </dev/null &
    echo $! >>"$folder/pids"
}

await() {
    local what=$1 log=$2
    shift 2
    for _ in $(seq "${PATIENCE_SECONDS:-120}"); do
        if "$@" >/dev/null 2>&1; then return; fi
        sleep 1
    done
    echo "error: $what did not start; see $log" >&2
    exit 1
}

: >"$folder/pids"
start_node head --head --port="$port" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" --include-dashboard=true
await "the head" "$folder/head.log" grep -q "Ray runtime started" "$folder/head.log"
for number in $(seq "$workers"); do
    start_node "worker-$number" --address="$address"
    await "worker $number" "$folder/worker-$number.log" grep -q "Ray runtime started" "$folder/worker-$number.log"
done

cat <<TEXT
A cluster of $((workers + 1)) nodes at $address. To use it:
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard
  ray job submit -- aceray train demo resources.workers=2 resources.address=auto
To end it:
  clusters/laptop/stop.sh
TEXT
