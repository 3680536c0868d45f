#!/usr/bin/env bash
# Train on this machine: launch/local.sh CONFIG [key.sub=value ...]
# Builds .venv when it is missing, uses every local device, and starts again after a crash, from the last checkpoint,
# RETRIES times (default 3). A mistake of the user's (exit 2) or a stop by hand (130) is final.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -lt 1 ]; then
  sed -n '2,4s/^# //p' "$0"
  exit 2
fi

make --silent ".venv/.base-${DEVICE:-cpu}" DEVICE="${DEVICE:-cpu}"

for attempt in $(seq 0 "${RETRIES:-3}"); do
  code=0
  .venv/bin/opus-jax train "$@" || code=$?
  case $code in
    0 | 2 | 130) exit "$code" ;;
  esac
  echo "launch/local.sh: attempt $attempt ended with $code" >&2
  sleep 5
done
exit "$code"
