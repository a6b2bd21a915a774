#!/usr/bin/env bash
# A Ray cluster on this machine: a head without cores and two workers, on loopback, with a token.
#   cluster/local.sh start     prints the address for `nfscale submit ... --address`
#   cluster/local.sh status
#   cluster/local.sh stop      ends what it started, and no other Ray
# Settings, by environment: WORKERS=2 CPUS=1 (of each) GPUS=0 (of each) PORT=26379 DASHBOARD_PORT=28265
# CLUSTER_DIR=/tmp/nfscale-UID (short: Ray's sockets are in it) RAY_AUTH_MODE=token (disabled: anyone here may submit)
set -euo pipefail

WORKERS=${WORKERS:-2}
CPUS=${CPUS:-1}
GPUS=${GPUS:-0}
PORT=${PORT:-26379} # not of 10002 to 19999, which Ray gives to its workers
DASHBOARD_PORT=${DASHBOARD_PORT:-28265}
CLUSTER_DIR=${CLUSTER_DIR:-/tmp/nfscale-$(id -u)}
ADDRESS=http://127.0.0.1:$DASHBOARD_PORT

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The environment that `make` installs, else the one that is active; jobs find `python` in it.
if [ -x "$root/.venv/bin/ray" ]; then PATH=$root/.venv/bin:$PATH; fi
export PATH
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
export RAY_USAGE_STATS_ENABLED=0
export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0

# Processes of this cluster, by the folder that each of them has in its command.
ours() { pgrep -f -- "[= ]$CLUSTER_DIR/" || true; }
starters() { pgrep -f -- " start .*--temp-dir=$CLUSTER_DIR/" || true; }

answers() { python - "$ADDRESS" <<'EOF'
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(sys.argv[1] + "/api/version", timeout=2)
except urllib.error.HTTPError as error:
    sys.exit(error.code not in (401, 403))
except OSError:
    sys.exit(1)
EOF
}

# `ray start` for 127.0.0.1: by itself it takes that for "the address that others see" and leaves loopback, but where
# RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, with which no second node may join.
RAY='import os, sys
import ray._private.services as services
from ray.scripts.scripts import main
services.get_node_ip_address = lambda address=None: "127.0.0.1"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # for jobs and workers, which dial loopback then
sys.exit(main())'

launch() { # NAME, then options of `ray start`; each node has a folder of its own, or they tidy up each other
  local name=$1
  shift
  setsid python -c "$RAY" start "$@" --temp-dir="$CLUSTER_DIR/$name" --node-ip-address=127.0.0.1 \
    --disable-usage-stats --object-store-memory=80000000 --dashboard-agent-listen-port=0 --block \
    >"$CLUSTER_DIR/$name.log" 2>&1 </dev/null &
}

start() {
  if ! command -v ray >/dev/null; then
    echo "error: no ray here; run make, or activate an environment with: pip install 'nfscale[cluster]'" >&2
    exit 2
  fi
  if [ -n "$(ours)" ]; then
    echo "error: $CLUSTER_DIR has a cluster; $0 stop ends it, CLUSTER_DIR and PORT name another" >&2
    exit 2
  fi
  mkdir -p "$CLUSTER_DIR"
  chmod 700 "$CLUSTER_DIR"
  if [ "$RAY_AUTH_MODE" = token ] && [ -z "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ]; then
    ray get-auth-token --generate >/dev/null # into ~/.ray/auth_token, unless there is one
  fi
  launch head --head --port="$PORT" --dashboard-host=127.0.0.1 --dashboard-port="$DASHBOARD_PORT" \
    --num-cpus=0 --num-gpus=0
  local _
  for _ in $(seq 120); do
    if answers; then break; fi
    sleep 0.5
  done
  if ! answers; then
    echo "error: the head does not answer; it said:" >&2
    tail -n 5 "$CLUSTER_DIR/head.log" >&2
    stop
    exit 1
  fi
  for number in $(seq "$WORKERS"); do
    launch "worker-$number" --address="127.0.0.1:$PORT" --num-cpus="$CPUS" --num-gpus="$GPUS"
  done
  echo "nfscale submit pipelines/digits.yaml --address $ADDRESS" >&2
  echo "$ADDRESS"
}

stop() {
  local _ pid
  for pid in $(starters | sort -rn); do kill -TERM "$pid" 2>/dev/null || true; done
  for _ in $(seq 40); do
    if [ -z "$(ours)" ]; then break; fi
    sleep 0.5
  done
  for pid in $(ours); do kill -KILL "$pid" 2>/dev/null || true; done
  rm -rf "$CLUSTER_DIR"/head "$CLUSTER_DIR"/worker-*
}

case "${1:-}" in
start) start ;;
stop) stop ;;
status) if answers; then echo "$ADDRESS"; else
  echo "no cluster at $ADDRESS" >&2
  exit 1
fi ;;
*)
  echo "usage: $0 start|stop|status" >&2
  exit 2
  ;;
esac
