#!/usr/bin/env bash
# Train on this machine: launch/local.sh [--dry-run] CONFIG [key.sub=value ...]
#
# Builds .venv when it is missing, uses every local device, and starts again from the last checkpoint after a crash.
#   PROCESSES=n  processes that train together (default 1); with DEVICE=gpu, process i sees GPU i
#   RETRIES=n    restarts after crashes (default 3); a preemption, which saves first, does not count
#   GRACE=n      seconds that the others have when one process fails, before they are killed (default 30)
#   DEVICE=gpu   use the CUDA build of JAX
#   --dry-run    print the commands, run nothing
# Exit codes: 0 finished; 2 a mistake of the user's; 130 Ctrl-C; 75 stopped by SIGTERM after a clean save, the same
# command goes on from there; anything else is the crash that was one too many.
#
# Example: PROCESSES=2 launch/local.sh configs/quickstart.yaml run.steps=100
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'launch/local.sh: %s\n' "$*" >&2; }
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' launch/local.sh; }

dry=
case "${1:-}" in
  --dry-run) dry=1 && shift ;;
  -h | --help) usage && exit 0 ;;
esac
if [ $# -lt 1 ]; then
  usage >&2
  exit 2
fi

processes=${PROCESSES:-1}
device=${DEVICE:-cpu}
if ! [[ $processes =~ ^[1-9][0-9]*$ ]]; then
  say "PROCESSES=$processes: must be a whole number from 1"
  exit 2
fi

# The command of one process, into the array `line`.
compose() {
  local index=$1 port=$2
  shift 2
  line=(.venv/bin/opus-jax train "$@")
  if [ "$processes" -gt 1 ]; then
    local variables=("OPUS_JAX_COORDINATOR=127.0.0.1:$port" "OPUS_JAX_PROCESSES=$processes" "OPUS_JAX_PROCESS=$index")
    if [ "$device" = gpu ]; then variables+=("CUDA_VISIBLE_DEVICES=$index"); fi
    line=(env "${variables[@]}" "${line[@]}")
  fi
}

free_port() { .venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

numbered() {
  local text
  while IFS= read -r text || [ -n "$text" ]; do printf '[%s] %s\n' "$1" "$text"; done
}

# Every process in the background, and its id in `pids`. Ctrl-C is ignored by background processes until they catch it
# themselves, and the terminal sends it to them directly; what this script passes on is always SIGTERM.
start() {
  local index port=
  pids=() readers=()
  if [ "$processes" -gt 1 ]; then port=$(free_port); fi
  for ((index = 0; index < processes; index++)); do
    compose "$index" "$port" "$@"
    if [ "$processes" -eq 1 ]; then
      "${line[@]}" < /dev/null &
    else
      mkfifo "$pipes/$index"
      numbered "$index" < "$pipes/$index" &
      readers+=($!)
      "${line[@]}" < /dev/null > "$pipes/$index" 2>&1 &
    fi
    pids+=($!)
  done
}

# Wait for all of `pids`; the first exit code that is not 0 goes into `code`, and ends the others.
watch() {
  local waiting=("${pids[@]}") running pid status deadline=
  code=0
  while [ ${#waiting[@]} -gt 0 ]; do
    running=()
    for pid in "${waiting[@]}"; do
      if kill -0 "$pid" 2> /dev/null; then
        running+=("$pid")
        continue
      fi
      status=0
      wait "$pid" || status=$?
      if [ "$status" -ne 0 ] && [ "$code" -eq 0 ]; then
        code=$status deadline=$((SECONDS + ${GRACE:-30}))
        pass_on TERM
      fi
    done
    waiting=(${running[@]+"${running[@]}"})
    if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then pass_on KILL; fi
    sleep 0.2 || true
  done
  for pid in ${readers[@]+"${readers[@]}"}; do wait "$pid" || true; done
}

pass_on() {
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do kill "-$1" "$pid" 2> /dev/null || true; done
}

if [ -n "$dry" ]; then
  printf '%q ' make --silent ".venv/.base-$device" "DEVICE=$device" && echo
  for ((index = 0; index < processes; index++)); do
    compose "$index" PORT "$@"
    printf '%q ' "${line[@]}" && echo
  done
  printf '%q ' .venv/bin/python launch/finished.py "$@" && echo
  exit 0
fi

make --silent ".venv/.base-$device" DEVICE="$device"

stopped=
pids=()
trap 'stopped=INT; pass_on TERM' INT
trap 'stopped=TERM; pass_on TERM' TERM
pipes=$(mktemp -d)
trap 'rm -rf "$pipes"' EXIT

crashes=0
while :; do
  rm -f "$pipes"/*
  start "$@"
  watch
  if [ "$stopped" = INT ]; then exit 130; fi
  if [ "$code" -eq 0 ]; then .venv/bin/python launch/finished.py "$@" || code=$?; fi
  case $code in
    0 | 2 | 130) exit "$code" ;;
    75) say "preempted after a clean save" ;;
    *) crashes=$((crashes + 1)) && say "crash $crashes: exit code $code" ;;
  esac
  if [ -n "$stopped" ] || [ "$crashes" -gt "${RETRIES:-3}" ]; then exit "$code"; fi
  sleep "${PAUSE:-5}" || true
done
