#!/usr/bin/env bash
# Start this machine's part of a training on several machines, with torchrun. Run it on each of them, in any order:
#
#   HEAD=10.1.0.5 NODES=2 NODE=0 launch/torchrun.sh launch/train.py --method onebit_adam     # on 10.1.0.5
#   HEAD=10.1.0.5 NODES=2 NODE=1 launch/torchrun.sh launch/train.py --method onebit_adam     # on the other
#
# HEAD        address of node 0 (IPv4, IPv6 or a name)         PORT        29500: where they meet on node 0
# NODES       how many machines                                SLOTS       1: processes on each, one a GPU
# NODE        which one this is: 0 is HEAD, then 1, 2 ...      JOB         commopt: tells jobs on one PORT apart
# RENDEZVOUS  c10d (may restart) or static                     RESTARTS    0: how often all ranks are started again when one dies
# WAIT_S      600: seconds to wait for the others              PYTHON      python: the interpreter that has commopt
# ADDRESS, INTERFACE  this machine's own; by default those that lead to HEAD
# PRINT=1     show the command, and start nothing
set -euo pipefail

fail() {
  echo "torchrun.sh: $1" >&2
  exit 2
}
is_number() { [[ $1 =~ ^(0|[1-9][0-9]{0,5})$ ]]; }

PORT=${PORT:-29500} SLOTS=${SLOTS:-1} JOB=${JOB:-commopt} RENDEZVOUS=${RENDEZVOUS:-c10d} RESTARTS=${RESTARTS:-0} WAIT_S=${WAIT_S:-600}
(($# > 0)) || fail "no program; append it, as in: HEAD=10.1.0.5 NODES=2 NODE=0 launch/torchrun.sh train.py --steps 100"
HEAD=${HEAD:-} HEAD=${HEAD#[} HEAD=${HEAD%]} # an IPv6 address may have brackets
[[ -n $HEAD ]] || fail "HEAD is not set; write the address of node 0, as in HEAD=10.1.0.5"
is_number "${NODES:-}" && ((NODES >= 1)) || fail "NODES=${NODES:-} is no number of machines; write it, as in NODES=2"
is_number "${NODE:-}" && ((NODE < NODES)) || fail "NODE=${NODE:-} is none of $NODES machines; write 0 on the one that is HEAD, and another number below $NODES on each of the others"
is_number "$SLOTS" && ((SLOTS >= 1)) || fail "SLOTS=$SLOTS is no number of processes; write 1 or more"
is_number "$PORT" && ((PORT >= 1 && PORT <= 65535)) || fail "PORT=$PORT is no port; write 1 to 65535, as in PORT=29500"
is_number "$RESTARTS" || fail "RESTARTS=$RESTARTS is no number; write 0 or more"
is_number "$WAIT_S" && ((WAIT_S >= 1)) || fail "WAIT_S=$WAIT_S is no number of seconds; write 1 or more"
[[ $RENDEZVOUS == c10d || $RENDEZVOUS == static ]] || fail "RENDEZVOUS=$RENDEZVOUS is unknown; write c10d or static"
[[ $RENDEZVOUS == c10d || $RESTARTS == 0 ]] || fail "RESTARTS=$RESTARTS needs RENDEZVOUS=c10d: with static, the others are not told of a restart"

# Gloo uses the interface of this machine's host name, which is often loopback: name the one that leads to HEAD.
if [[ -z ${ADDRESS:-} || -z ${INTERFACE:-} ]]; then
  command -v ip > /dev/null || fail "no 'ip' command; install iproute2, or set ADDRESS and INTERFACE to this machine's own"
  head=$(getent ahostsv4 "$HEAD" || getent ahostsv6 "$HEAD") || true
  head=${head%%[[:space:]]*}
  [[ -n $head ]] || fail "HEAD=$HEAD: no address is known for this name here; write the address itself"
  [[ $head != 127.* && $head != ::1 || $HEAD == "$head" || $HEAD == 127.* || $HEAD == localhost || $NODES == 1 ]] ||
    fail "HEAD=$HEAD is $head on this machine, which no other can reach; write the address that the others use"
  route=$(ip -o route get "$head") || fail "HEAD=$HEAD: no route leads to $head; is the network up?"
  [[ $NODE != 0 || -n ${ADDRESS:-} || $route == local* ]] ||
    fail "NODE=0 is the machine that is HEAD, and $head is not an address of this one; write another NODE here, or another HEAD"
  ADDRESS=${ADDRESS:-$(sed 's/.* src \([0-9a-f.:]*\).*/\1/' <<< "$route")}
  INTERFACE=${INTERFACE:-$(ip -o addr show | awk -v own="$ADDRESS" '$4 == own || index($4, own "/") == 1 { print $2 }')}
  INTERFACE=${INTERFACE%%$'\n'*} INTERFACE=${INTERFACE:-lo} # no interface lists 127.0.0.2
fi
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$INTERFACE}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((($(nproc) - 1) / SLOTS) + 1))}
export COMMOPT_NODE=${COMMOPT_NODE:-node$NODE} COMMOPT_NODE_RANK=$NODE
[[ $INTERFACE == lo ]] || export COMMOPT_NIC=${COMMOPT_NIC:-$INTERFACE} # its byte count is compared with commopt's own

words=("${PYTHON:-python}" -m torch.distributed.run "--nnodes=$NODES" "--nproc-per-node=$SLOTS")
words+=(--log-dir=/dev/null) # or torchrun leaves an empty folder in /tmp; all output is printed here
if [[ $RENDEZVOUS == static ]]; then
  words+=("--node-rank=$NODE" "--master-addr=$HEAD" "--master-port=$PORT" "--rdzv-conf=timeout=$WAIT_S")
else
  # Only HEAD holds the store. torchrun guesses by name whether a machine is HEAD, and guesses wrong in containers and namespaces.
  is_host=$([[ $NODE == 0 ]] && echo true || echo false)
  endpoint=$HEAD:$PORT
  [[ $HEAD != *:* ]] || endpoint=[$HEAD]:$PORT
  words+=(--rdzv-backend=c10d "--rdzv-id=$JOB" "--rdzv-endpoint=$endpoint" "--rdzv-conf=is_host=$is_host,read_timeout=$WAIT_S")
  words+=("--local-addr=$ADDRESS" "--max-restarts=$RESTARTS")
  # By default, torchrun keeps one store over all restarts, where ranks find addresses of ranks that are gone
  # (pytorch/pytorch#135712, still so in 2.13); with this, rank 0 opens a new one for each.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
words+=("$@")
if [[ -n ${PRINT:-} ]]; then
  printf 'GLOO_SOCKET_IFNAME=%s' "$GLOO_SOCKET_IFNAME"
  [[ $RENDEZVOUS == static ]] || printf ' TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1'
  printf ' %q' "${words[@]}"
  echo
else
  echo "torchrun.sh: node $NODE of $NODES, to meet the others at $HEAD:$PORT" >&2
  exec "${words[@]}"
fi
