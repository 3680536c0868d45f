#!/usr/bin/env bash
# One training process on a machine, or in a container, that some launcher started for it:
#   launch/worker.sh CONFIG [key.sub=value ...]
#
# Ends what an earlier attempt may have left on the machine, hands SIGTERM on to the training process, and exits with
# its code. Where that is 0 but the run is not finished, which process 0 finds out by asking for summary.json, the exit
# code is 75: preempted after a clean save, start again.
#   LAUNCHER_CHECKS=1  the launcher asks for summary.json by itself
set -euo pipefail
cd "$(dirname "$0")/.."

bin=.venv/bin/
if [ ! -x .venv/bin/opus-jax ]; then bin=; fi # in a container the package is installed for everybody
left=${TMPDIR:-/tmp}/opus-jax-train.pid

trains() { { tr '\0' ' ' < "/proc/$1/cmdline"; } 2> /dev/null | grep -q 'opus-jax train'; }

# A connection that broke leaves the process at work, and the accelerator with it.
end_earlier() {
  local pid
  if ! [ -s "$left" ]; then return 0; fi
  pid=$(cat "$left")
  if trains "$pid"; then
    echo "launch/worker.sh: ending process $pid, left by an earlier attempt" >&2
    kill -KILL "$pid" 2> /dev/null || true
    while trains "$pid"; do sleep 0.2; done
  fi
}

# Process 0 has index 0 in everything that counts it; what this machine's launcher does not count is not set.
is_first() {
  local index
  for index in "${OPUS_JAX_PROCESS:-0}" "${SKYPILOT_NODE_RANK:-0}" "${MEGASCALE_SLICE_ID:-0}" "${TPU_WORKER_ID:-0}" \
    "${JOB_COMPLETION_INDEX:-0}"; do
    if [ "$index" != 0 ]; then return 1; fi
  done
}

end_earlier
"${bin}opus-jax" train "$@" < /dev/null &
child=$!
echo "$child" > "$left"
trap 'kill -TERM "$child" 2> /dev/null || true' TERM INT

wait "$child" || true
while kill -0 "$child" 2> /dev/null; do wait "$child" || true; done # a signal ends `wait`, not the process
code=0
wait "$child" || code=$?
rm -f "$left"

if [ "$code" -eq 0 ] && [ -z "${LAUNCHER_CHECKS:-}" ] && is_first; then
  "${bin}python" launch/finished.py "$@" || code=$?
fi
exit "$code"
