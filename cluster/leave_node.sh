#!/bin/bash
# Say that this machine is about to be taken away, so that what trains saves and leaves in time.
#
#   cluster/leave_node.sh [SECONDS]
#
# Drivers of Statewide on this machine save and end with exit code 75 ("try again"). A worker node is
# drained: training saves, and starts again on the other nodes. Returns when nothing trains here any
# more, or after SECONDS (100). For a cloud's notice of pre-emption, a preStop hook, or by hand.
set -euo pipefail

if (($# > 1)) || [[ ! "${1:-100}" =~ ^[0-9]+$ ]]; then
    echo "usage: leave_node.sh [SECONDS]" >&2
    exit 2
fi
wait_s="${1:-100}"
drivers='^[^ ]*python[^ ]* ([^ ]*/statewide|-m launcher\.cli) (run|train|embed train) '

# SIGTERM once: a second one would end a driver without a save.
pkill -TERM -f "${drivers}" || true

# Never the head: it holds all that Ray knows, and gives no work to drain away.
if raylet="$(pgrep -a -o -x raylet)" && ! pgrep -x gcs_server >/dev/null; then
    option() { grep -oE -- "--$1=[^ ]+" <<<"${raylet}" | head -n 1 | cut -d = -f 2; }
    RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}" ray drain-node \
        --address "$(option gcs-address)" --node-id "$(option node_id)" \
        --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "leave_node.sh" \
        --deadline-remaining-seconds "${wait_s}"
fi

while ((SECONDS < wait_s)) && pgrep -f "^ray::[^ ]*RayTrainWorker|${drivers}" >/dev/null; do
    sleep 1
done
