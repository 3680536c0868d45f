#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster without xpk: launch/gke_jobset.sh [--dry-run] CONFIG [key.sub=value ...]
#
# Fills in launch/jobset.yaml from the variables below and gives it to kubectl; the cluster needs the JobSet controller.
# A slice that fails is started again with all others, from the last checkpoint; exit code 2 (a mistake of the user's)
# ends the workload. --dry-run prints the manifest.
#   NAME=opus-1            of the workload
#   IMAGE=...              built from launch/Dockerfile.tpu and pushed
#   ACCELERATOR=...        tpu-v5p-slice, tpu-v5-lite-podslice, tpu-v6e-slice, ...
#   TOPOLOGY=4x4x4         chips of one slice along its axes
#   BUCKET=...             a storage bucket, mounted as /runs: for run.dir
#   SERVICE_ACCOUNT=...    of Kubernetes, that may write to the bucket (default "default")
#   CHIPS=4                chips of one machine (default 4)
#   SLICES=1               slices that train together (default 1)
#   RESTARTS=100           restarts at most (default 100)
#   GRACE=120              seconds to save in, when a machine is taken away (default 120)
#
# Example: NAME=opus-1 IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/opus-jax:1 ACCELERATOR=tpu-v5p-slice TOPOLOGY=2x2x4 \
#            BUCKET=my-runs launch/gke_jobset.sh configs/opus_direct.yaml run.dir=/runs/opus-1
set -euo pipefail
cd "$(dirname "$0")/.."

mistake() { printf 'launch/gke_jobset.sh: %s; see launch/gke_jobset.sh --help\n' "$*" >&2 && exit 2; }
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' launch/gke_jobset.sh; }

dry=
case "${1:-}" in
  --dry-run) dry=1 && shift ;;
  -h | --help) usage && exit 0 ;;
esac
if [ $# -lt 1 ]; then mistake "give a CONFIG"; fi
if [ ! -f "$1" ] || [[ $1 = /* ]]; then mistake "no configuration $1 in this checkout"; fi
for variable in NAME IMAGE ACCELERATOR TOPOLOGY BUCKET; do
  if [ -z "${!variable:-}" ]; then mistake "set $variable"; fi
done
CHIPS=${CHIPS:-4}
# The names of the pods are longer by some twenty letters, and Kubernetes allows 63.
if ! [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]]; then mistake "NAME=$NAME: at most 40 small letters, digits and -"; fi
if ! [[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || [ $((${TOPOLOGY//x/*} % CHIPS)) -ne 0 ]; then
  mistake "TOPOLOGY=$TOPOLOGY: must be like 2x4 or 2x2x4, a multiple of CHIPS=$CHIPS chips"
fi
# shellcheck disable=SC2034  # read by its name, below
HOSTS=$((${TOPOLOGY//x/*} / CHIPS))
# shellcheck disable=SC2034
COMMAND=$(printf '%q ' launch/worker.sh "$@")

# Values stand in double quotes in the manifest; then what is special to sed.
quoted() { printf '%s' "$1" | sed 's/[\\"]/\\&/g; s/[\\|&]/\\&/g'; }

manifest() {
  local script='/^#/d' variable
  SLICES=${SLICES:-1} SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default} RESTARTS=${RESTARTS:-100} GRACE=${GRACE:-120}
  for variable in NAME IMAGE ACCELERATOR TOPOLOGY BUCKET SERVICE_ACCOUNT CHIPS HOSTS SLICES RESTARTS GRACE COMMAND; do
    script+="; s|\${$variable}|$(quoted "${!variable}")|g"
  done
  sed "$script" launch/jobset.yaml
}

if [ -n "$dry" ]; then
  manifest
else
  manifest | kubectl apply -f -
fi
