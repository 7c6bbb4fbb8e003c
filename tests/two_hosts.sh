#!/usr/bin/env bash
# One command on two hosts: network namespaces 10.77.0.1 and 10.77.0.2 with a wire (veth) as the only way between them.
#
#     tests/two_hosts.sh COMMAND...
#
# In COMMAND {node} becomes 0 or 1, {address} the host's address, {master} the first host's address and a port:
#
#     tests/two_hosts.sh python -m paddle.distributed.launch --master {master} --nnodes 2 --rank {node} \
#         --host {address} --nproc_per_node 2 --log_dir log_{node} alignment/sft/run_sft.py sft.json
#
# Exit status 0: the command ended well on both; when it fails on one, the other is stopped after 10 seconds.
# It needs root or unprivileged user namespaces. The kernel takes everything away with the script's PID namespace.
set -u -o pipefail
ADDRESSES=(10.77.0.1 10.77.0.2)
MASTER=${ADDRESSES[0]}:8765

if [[ ${1:-} != --inside ]]; then
    as_root=()
    ((EUID == 0)) || as_root=(unshare --map-root-user)
    trap 'kill -KILL "$namespaces"' EXIT
    trap 'exit 1' HUP INT TERM
    "${as_root[@]}" setpriv --pdeathsig KILL \
        unshare --net --pid --fork --kill-child --mount-proc bash "$0" --inside "$@" &
    namespaces=$!
    wait "$namespaces"
    status=$?
    trap - EXIT
    exit "$status"
fi
shift

plug() { # NODE PREFIX...: bring up the interfaces of a host; PREFIX enters it
    "${@:2}" ip link set lo up && "${@:2}" ip addr add "${ADDRESSES[$1]}/24" dev eth0 && "${@:2}" ip link set eth0 up
}

run() { # NODE COMMAND...
    local node=$1 enter=() command=("${@:2}")
    ((node == 0)) || enter=("${second[@]}")
    command=("${command[@]//\{node\}/$node}")
    command=("${command[@]//\{address\}/${ADDRESSES[node]}}")
    "${enter[@]}" "${command[@]//\{master\}/$MASTER}" 2>&1 | sed -u "s/^/host $node: /"
}

# The second host; this shell is in the first. It speaks once its namespace is there: before that eth0 would collide.
coproc second_host { exec unshare --net sh -c 'echo ready && exec sleep infinity'; }
read -r -u "${second_host[0]}" || exit 1
second=(nsenter "--net=/proc/$second_host_PID/ns/net")
ip link add eth0 type veth peer name eth0 netns "$second_host_PID" && plug 0 && plug 1 "${second[@]}" || exit 1

run 0 "$@" &
first_run=$!
run 1 "$@" &
second_run=$!
wait -n "$first_run" "$second_run"
status=$?
if ((status == 0)); then
    wait "$first_run" && wait "$second_run"
    exit
fi
for _ in {1..100}; do
    kill -0 "$first_run" || kill -0 "$second_run" || break
    sleep 0.1
done 2>/dev/null
exit "$status"
