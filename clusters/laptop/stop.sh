#!/usr/bin/env bash
# End the cluster that start.sh started, and no other: `ray stop` would end every Ray on this machine.
#
#   ACERAY_CLUSTER  the folder that start.sh was given   (~/.aceray/laptop)
set -euo pipefail

folder=${ACERAY_CLUSTER:-$HOME/.aceray/laptop}
if [[ ! -s $folder/pids ]]; then
    echo "error: $folder: no cluster was started here" >&2
    exit 2
fi
mapfile -t groups < <(tac "$folder/pids") # the head last

alive() { kill -0 -- "-$1" 2>/dev/null; }

for group in "${groups[@]}"; do
    kill -TERM -- "-$group" 2>/dev/null || true
    for _ in $(seq 20); do
        alive "$group" || break
        sleep 0.5
    done
    kill -KILL -- "-$group" 2>/dev/null || true
done
rm "$folder/pids"
echo "The cluster is ended; its token stays in $folder."
