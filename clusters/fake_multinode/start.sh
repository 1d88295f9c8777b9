#!/usr/bin/env bash
# An autoscaling cluster on this machine, to see nodes come and go without a cloud. Runs until Ctrl-C or SIGTERM.
#
#   PORT, DASHBOARD_PORT                                               (6379, 8265)
#   RAY_AUTH_TOKEN_PATH   the token; made by `ray get-auth-token --generate`   (~/.ray/auth_token)
#   RAY_TMPDIR            where Ray keeps its sessions, a short path   (/tmp/ray)
set -euo pipefail

port=${PORT:-6379} dashboard=${DASHBOARD_PORT:-8265}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ACERAY_HEAD=$(hostname -I | cut -d' ' -f1):$port
export ACERAY_HEAD
export RAY_FAKE_CLUSTER=1 RAY_AUTH_MODE=token RAY_raylet_start_wait_time_s=120 RAY_DASHBOARD_STARTUP_TIMEOUT_S=240

cluster=$(mktemp --suffix=.yaml)
# shellcheck disable=SC2016 # the name of the variable is meant
envsubst '$ACERAY_HEAD' <"$here/cluster.yaml" >"$cluster"
exec ray start --head --block --port="$port" --num-cpus=0 --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
    --dashboard-agent-listen-port=0 --min-worker-port=0 --max-worker-port=0 --include-dashboard=true \
    --autoscaling-config="$cluster" --disable-usage-stats
