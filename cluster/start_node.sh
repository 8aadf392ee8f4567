#!/bin/bash
# Start Ray on one machine of a cluster without a scheduler.
#
#   cluster/start_node.sh head [OPTION ...]                  on the head, which takes no work
#   cluster/start_node.sh worker HEAD[:6379] [OPTION ...]    on each of the others
#
# Options go to `ray start`, such as --num-cpus 8 or --temp-dir /scratch/ray.
# The environment must be active (ray and python on PATH). Settings, all optional:
#   STATEWIDE_IFNAME   network interface that reaches the other machines, such as eth0 or ib0
#   RAY_AUTH_TOKEN_PATH  file with the token; default ~/.ray/auth_token, the same on all machines
set -euo pipefail

usage() {
    echo "usage: start_node.sh head [OPTION ...] | start_node.sh worker HEAD[:6379] [OPTION ...]" >&2
    exit 2
}

command -v ray >/dev/null || {
    echo "error: ray is not on PATH; activate the environment first" >&2
    exit 2
}

# Set in the environment of `ray start`: the workers inherit it from there.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
if [[ -n "${STATEWIDE_IFNAME:-}" ]]; then
    # Without it gloo may offer 127.0.0.1 to its peers: "Gloo connectFullMesh failed".
    export GLOO_SOCKET_IFNAME="${STATEWIDE_IFNAME}" NCCL_SOCKET_IFNAME="${STATEWIDE_IFNAME}"
fi
token_path="${RAY_AUTH_TOKEN_PATH:-${HOME}/.ray/auth_token}"

case "${1:-}" in
head)
    shift
    [[ "${1:---}" == -* ]] || usage
    if [[ ! -s "${token_path}" ]]; then
        # Written as nobody else can read it, and complete or not at all.
        mkdir -p "$(dirname "${token_path}")"
        (umask 077 && ray get-auth-token --generate >/dev/null)
    fi
    exec ray start --head --port 6379 --dashboard-host 0.0.0.0 --dashboard-port 8265 --num-cpus 0 "$@"
    ;;
worker)
    (($# >= 2)) && [[ "$2" != -* ]] && [[ "${3:---}" == -* ]] || usage
    if [[ ! -s "${token_path}" ]]; then
        echo "error: ${token_path} does not exist; copy it from the head" >&2
        exit 2
    fi
    address="$2"
    [[ "${address}" == *:* ]] || address="${address}:6379"
    exec ray start --address "${address}" "${@:3}"
    ;;
*)
    usage
    ;;
esac
