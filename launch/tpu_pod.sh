#!/usr/bin/env bash
# Train on a Cloud TPU slice, or several: launch/tpu_pod.sh NAME CONFIG [key.sub=value ...] --zone Z --type T [options]
#
# Asks for the slice as a queued resource, waits until it is active, copies this checkout to every worker, installs it,
# trains on all workers, and collects their logs. A slice that was taken away is asked for again, and the run goes on
# from its last checkpoint: run.dir must be on storage that outlives the slice, and where a slice has several workers, a
# path that all of them see (--setup mounts it).
#   --zone Z         for example us-east5-a
#   --type T         accelerator type, for example v5p-64, v5litepod-256, v6e-16
#   --runtime R      software version of the TPU machines (default v2-alpha-tpuv5 for v5p, v2-alpha-tpuv5-lite for
#                    v5litepod, v2-alpha-tpuv6e for v6e, tpu-ubuntu2204-base otherwise)
#   --project P      Google Cloud project (default: that of gcloud)
#   --slices N       slices that train together (default 1)
#   --workers N      machines that a slice must have (default: as many as it says it has)
#   --spot           spot capacity     --reserved  reserved capacity
#   --extras LIST    extras of pyproject.toml to install (default tpu)
#   --setup COMMAND  run on every worker before training, for example to mount storage
#   --retries N      restarts after crashes while the slice is there (default 3); preemptions do not count
#   --poll S         seconds between looks at the state of the slice (default 30)
#   --logs DIR       where the logs go (default runs/logs/NAME): attempt-N/NODE/WORKER.log
#   --internal-ip    reach the workers by their internal addresses
#   --delete         delete the slice at the end, however it ends
#   --dry-run        print the commands, run nothing
# Ctrl-C stops the run on all workers after a clean save; a second one only leaves this script.
# Exit codes: 0 finished; 2 a mistake of the user's; 130 Ctrl-C; 1 the slice cannot be had; else the last crash.
#
# Example: launch/tpu_pod.sh opus-1 configs/opus_direct.yaml run.dir=/shared/opus-1 --zone us-east5-a --type v5p-64 \
#            --spot --delete --setup 'sudo mkdir -p /shared && sudo mount -t nfs HOST:/SHARE /shared'
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'launch/tpu_pod.sh: %s\n' "$*" >&2; }
mistake() { say "$*; see launch/tpu_pod.sh --help" && exit 2; }
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' launch/tpu_pod.sh; }

zone='' type='' runtime='' project='' slices=1 workers='' capacity='' extras=tpu retries=3
poll=30 logs='' setup='' delete='' dry=''
reach=() words=()
while [ $# -gt 0 ]; do
  case $1 in
    --zone | --type | --runtime | --project | --slices | --workers | --extras | --setup | --retries | --poll | --logs)
      if [ $# -lt 2 ]; then mistake "$1 needs a value"; fi
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --spot | --reserved) capacity=$1 ;;
    --internal-ip) reach=(--internal-ip) ;;
    --delete) delete=1 ;;
    --dry-run) dry=1 ;;
    -h | --help) usage && exit 0 ;;
    -*) mistake "unknown option $1" ;;
    *) words+=("$1") ;;
  esac
  shift
done

if [ ${#words[@]} -lt 2 ]; then mistake "give a NAME and a CONFIG"; fi
name=${words[0]} config=${words[1]} overrides=("${words[@]:2}")
if [ -z "$zone" ] || [ -z "$type" ]; then mistake "give --zone and --type"; fi
if ! [[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]]; then mistake "NAME $name: small letters, digits and - only"; fi
if ! [[ $slices =~ ^[1-9][0-9]*$ ]]; then mistake "--slices $slices: must be a whole number from 1"; fi
if [ ! -f "$config" ] || [[ $config = /* ]]; then mistake "no configuration $config in this checkout"; fi
if ! [[ " ${overrides[*]-} " =~ \ run\.dir=(/|[a-z0-9]+://) ]] && ! grep -qE '^ +dir: *"?(/|[a-z0-9]+://)' "$config"; then
  mistake "run.dir must be on storage that all workers share and that outlives them: an absolute path, or gs://..."
fi
if [ -z "$runtime" ]; then
  case $type in
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) runtime=tpu-ubuntu2204-base ;;
  esac
fi
logs=${logs:-runs/logs/$name}
place=(--zone="$zone" ${project:+--project="$project"})
nodes=("$name")
if [ "$slices" -gt 1 ]; then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

# ------------------------------------------------------------------------------------------------- commands

run() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

queued() { run gcloud compute tpus queued-resources "$1" "$name" "${place[@]}" "${@:2}"; }

# on NODE WORKERS COMMAND [gcloud option ...]
on() {
  run gcloud compute tpus tpu-vm ssh "$1" "${place[@]}" ${reach[@]+"${reach[@]}"} "--worker=$2" "--command=$3" "${@:4}"
}

create() {
  local shape=(--node-id="$name")
  if [ "$slices" -gt 1 ]; then shape=(--node-count="$slices" --node-prefix="$name"); fi
  say "asking for $slices x $type in $zone"
  queued create --accelerator-type="$type" --runtime-version="$runtime" "${shape[@]}" ${capacity:+"$capacity"} --quiet
}

remove() { queued delete --force --quiet; }

state() {
  local answer
  if answer=$(queued describe --format='value(state.state)' 2>&1); then
    echo "$answer"
  elif [[ $answer =~ NOT_FOUND|"not found"|"does not exist" ]]; then
    echo ABSENT
  else
    say "$answer"
    echo UNKNOWN
  fi
}

# What a node says of itself: its state and how many workers it has.
node_facts() {
  run gcloud compute tpus tpu-vm describe "$1" "${place[@]}" --format='value(state,networkEndpoints.len())' 2> /dev/null
}

ready() {
  local node
  if [ "$(state)" != ACTIVE ]; then return 1; fi
  for node in "${nodes[@]}"; do
    if [[ $(node_facts "$node") != READY* ]]; then return 1; fi
  done
}

# Until the slice is there. What failed, or was taken away, is removed and asked for again.
acquire() {
  local now asked='' unknown=0
  while :; do
    now=$(state)
    case $now in
      ACTIVE)
        if ready; then return 0; fi
        say "the slice was taken away"
        remove
        ;;
      ABSENT) create && asked=1 || return 1 ;;
      SUSPENDED) remove ;;
      FAILED)
        if [ -n "$asked" ]; then
          queued describe --format='value(state)' >&2
          say "the slice cannot be had"
          return 1
        fi
        remove
        ;;
      UNKNOWN)
        unknown=$((unknown + 1))
        if [ "$unknown" -gt 10 ]; then return 1; fi
        ;;
      *) say "$name: $now" ;;
    esac
    sleep "$poll"
  done
}

# Refuse to start on some of the workers: the others would wait for them for ever.
check_workers() {
  local node expected found
  for node in "${nodes[@]}"; do
    expected=${workers:-$(node_facts "$node" | awk '{print $2}')}
    found=$(on "$node" all 'echo worker-is-here' | grep -c worker-is-here) || true
    if [ -z "$expected" ] || [ "$found" != "$expected" ]; then
      say "$node: $found of ${expected:-?} workers answer"
      return 1
    fi
  done
}

quoted() { printf '%q ' "$@"; }

install() {
  local node
  archive=$(mktemp -d)/opus-jax.tgz
  run bash -o pipefail -c "git ls-files -z --cached --others --exclude-standard | tar --null -T - -czf $archive" || return 1
  # The machines' own Python may be too old; uv brings one that fits.
  local command="mkdir -p opus-jax && tar -xzf opus-jax.tgz -C opus-jax && python3 -m pip install --quiet --user uv"
  command+=" && PATH=\$HOME/.local/bin:\$PATH opus-jax/launch/venv.sh .venv $extras"
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm scp "$archive" "$node:opus-jax.tgz" "${place[@]}" ${reach[@]+"${reach[@]}"} --worker=all &&
      on "$node" all "$command" && { [ -z "$setup" ] || on "$node" all "$setup"; } || return 1
  done
}

# All workers of all slices at once; the first exit code that is not 0. gcloud runs a command again when its connection
# breaks, which launch/worker.sh is made for.
train() {
  local node folder command status pids=() tail
  command="cd opus-jax && LAUNCHER_CHECKS=1 launch/worker.sh $(quoted "$config" ${overrides[@]+"${overrides[@]}"})"
  folder=$logs/attempt-$attempt
  for node in "${nodes[@]}"; do
    run mkdir -p "$folder/$node"
    on "$node" all "$command" "--output-directory=$folder/$node" &
    pids+=($!)
    if [ -n "$dry" ]; then wait; fi
  done
  if [ -n "$dry" ]; then return 0; fi
  tail -n +1 -F "$folder/${nodes[0]}/0.log" 2> /dev/null &
  tail=$!
  code=0
  for pid in "${pids[@]}"; do
    wait "$pid" || true
    while kill -0 "$pid" 2> /dev/null; do wait "$pid" || true; done # Ctrl-C ends `wait`, not the connection
    status=0
    wait "$pid" || status=$?
    if [ "$code" -eq 0 ]; then code=$status; fi
  done
  kill "$tail" 2> /dev/null || true
  return "$code"
}

finished() { on "${nodes[0]}" 0 "cd opus-jax && .venv/bin/python launch/finished.py $(quoted "$config" ${overrides[@]+"${overrides[@]}"})"; }

stop() {
  if [ -n "$stopped" ] || [ -z "$training" ]; then exit 130; fi
  stopped=1
  say "stopping after a clean save; Ctrl-C again to leave it running"
  # shellcheck disable=SC2016  # to be expanded over there
  for node in "${nodes[@]}"; do on "$node" all 'kill -TERM "$(cat "${TMPDIR:-/tmp}/opus-jax-train.pid")"' & done
}

# ------------------------------------------------------------------------------------------------- the run

stopped='' training='' archive=''
at_end() {
  if [ -n "$archive" ]; then rm -rf "$(dirname "$archive")"; fi
  if [ -n "$delete" ]; then remove; fi
}
trap at_end EXIT

if [ -n "$dry" ]; then
  attempt=1
  create
  queued describe --format='value(state.state)'
  for node in "${nodes[@]}"; do
    node_facts "$node"
    on "$node" all 'echo worker-is-here'
  done
  install
  train
  finished
  exit 0
fi

trap stop INT
crashes=0 installed=
for ((attempt = 1; ; attempt++)); do
  if [ -z "$installed" ] || ! ready; then
    installed=
    acquire || exit 1
  fi
  code=0
  if [ -n "$stopped" ]; then exit 130; fi
  if [ -z "$installed" ]; then
    if check_workers && install; then installed=1; else code=1; fi
  fi
  if [ "$code" -eq 0 ]; then
    training=1
    train || code=$?
    training=
  fi
  if [ -n "$stopped" ]; then exit 130; fi
  if [ "$code" -eq 0 ]; then finished || code=$?; fi
  case $code in
    0 | 2 | 130) exit "$code" ;;
  esac
  if [ "$code" -eq 75 ] || ! ready; then
    say "attempt $attempt: preempted"
  else
    crashes=$((crashes + 1))
    say "attempt $attempt: exit code $code (logs in $logs/attempt-$attempt), crash $crashes"
    if [ "$crashes" -gt "$retries" ]; then exit "$code"; fi
  fi
  sleep "${PAUSE:-5}"
done
