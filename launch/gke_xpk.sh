#!/usr/bin/env bash
# Train on a GKE cluster by xpk: launch/gke_xpk.sh NAME CONFIG [key.sub=value ...] --cluster C --image I --type T [options]
#
# Makes a workload that trains on every machine of the slices and starts again, from the last checkpoint, when machines
# are taken away. xpk must be installed, the cluster made (xpk cluster create), and the image built from
# launch/Dockerfile.tpu or launch/Dockerfile.gpu and pushed. run.dir must be a path that all machines see (xpk storage
# attach).
#   --cluster C      the cluster
#   --image I        the image, with this package installed and launch/ in its working directory
#   --type T         slice type, for example v5p-64, v5litepod-256, v6e-16; or for GPUs, for example h100-80gb-8
#   --slices N       slices (default 1); for GPUs, machines
#   --zone Z         --project P
#   --restarts N     restarts at most, preemptions included (default 100)
#   --priority P     very-low, low, medium, high or very-high (default medium)
#   --grace S        seconds to save in, when a machine is taken away (default 120)
#   --dry-run        print the command, run nothing
#
# Example: launch/gke_xpk.sh opus-1 configs/opus_direct.yaml run.dir=/runs/opus-1 --cluster pods \
#            --image REGION-docker.pkg.dev/PROJECT/REPOSITORY/opus-jax:1 --type v5p-64 --zone us-east5-a
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'launch/gke_xpk.sh: %s\n' "$*" >&2; }
mistake() { say "$*; see launch/gke_xpk.sh --help" && exit 2; }
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' launch/gke_xpk.sh; }

cluster='' image='' type='' slices=1 zone='' project='' restarts=100 priority=medium grace=120 dry='' words=()
while [ $# -gt 0 ]; do
  case $1 in
    --cluster | --image | --type | --slices | --zone | --project | --restarts | --priority | --grace)
      if [ $# -lt 2 ]; then mistake "$1 needs a value"; fi
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --dry-run) dry=1 ;;
    -h | --help) usage && exit 0 ;;
    -*) mistake "unknown option $1" ;;
    *) words+=("$1") ;;
  esac
  shift
done

if [ ${#words[@]} -lt 2 ]; then mistake "give a NAME and a CONFIG"; fi
name=${words[0]} config=${words[1]} overrides=("${words[@]:2}")
if [ -z "$cluster" ] || [ -z "$image" ] || [ -z "$type" ]; then mistake "give --cluster, --image and --type"; fi
# xpk adds to the name, and Kubernetes allows 63 letters.
if ! [[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]]; then mistake "NAME $name: at most 40 small letters, digits and -"; fi
if [ ! -f "$config" ] || [[ $config = /* ]]; then mistake "no configuration $config in this checkout"; fi

case $type in
  v[0-9]* | tpu*) machines=(--tpu-type "$type" --num-slices "$slices") ;;
  *) machines=(--device-type "$type" --num-nodes "$slices") ;;
esac
# shellcheck disable=SC2054  # the comma is xpk's
# 1: a crash; 75: launch/worker.sh says that the run is not finished. 2, a mistake of the user's, is final.
line=(xpk workload create --workload "$name" --cluster "$cluster" "${machines[@]}" --docker-image "$image"
  --command "$(printf '%q ' exec launch/worker.sh "$config" ${overrides[@]+"${overrides[@]}"})"
  --max-restarts "$restarts" --restart-on-exit-codes 1,75 --termination-grace-period-seconds "$grace"
  --priority "$priority" ${zone:+--zone "$zone"} ${project:+--project "$project"})
if [ -n "$dry" ]; then
  printf '%q ' "${line[@]}" && echo
else
  "${line[@]}"
fi
