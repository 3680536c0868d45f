#!/usr/bin/env bash
# Build or renew the virtual environment: launch/venv.sh FOLDER EXTRAS   (EXTRAS: "", dev, gpu, "dev,gpu", ...)
# PYTHON=/path/to/python chooses the interpreter; otherwise the first that fits of python3, python3.13, 3.12, 3.11.
set -euo pipefail

folder=$1 extras=${2:-}
cd "$(dirname "$0")/.."

say() { printf 'opus-jax: %s\n' "$*" >&2; }

case "$(uname -s)" in
  Linux | Darwin) ;;
  *)
    say "Windows itself is not supported: install WSL 2 (wsl --install) and run make in its Linux shell"
    exit 1
    ;;
esac

# An interpreter must start (a version manager's placeholder may not), and be 3.11 to 3.13.
fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' > /dev/null 2>&1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if command -v "$candidate" > /dev/null && fits "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
}

has_venv() { "$1" -c 'import ensurepip, venv' > /dev/null 2>&1; }

create() {
  local python
  python=$(find_python)
  if [ -n "$python" ] && has_venv "$python"; then
    "$python" -m venv --clear "$folder"
  elif command -v uv > /dev/null; then
    uv venv --quiet --clear --seed --python "${python:-3.12}" "$folder"
  elif [ -n "$python" ]; then
    local version
    version=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    say "$python cannot make virtual environments: sudo apt install $version   (or install uv), then run make again"
    exit 1
  else
    local found=absent
    if command -v "${PYTHON:-python3}" > /dev/null; then found=$("${PYTHON:-python3}" --version 2>&1 | head -n 1 || true); fi
    say "Python 3.11, 3.12 or 3.13 is needed; ${PYTHON:-python3} here is: $found"
    say "install one (Debian, Ubuntu: sudo apt install python3.12 python3.12-venv; macOS: brew install python@3.12), or install uv"
    exit 1
  fi
}

# Versions that were tested together, where this Python has a list; elsewhere the ranges of pyproject.toml hold.
install() {
  local python="$folder/bin/python" version constraints=()
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if [ "${PINNED:-1}" = 1 ] && [ -f "requirements/python$version.txt" ]; then
    constraints=(--constraint "requirements/python$version.txt")
  fi
  local progress=off
  if [ -t 1 ]; then progress=on; fi
  PYTHONWARNINGS=ignore "$python" -m pip install --quiet --disable-pip-version-check --progress-bar "$progress" \
    ${constraints[@]+"${constraints[@]}"} --editable ".${extras:+[$extras]}"
}

if [ ! -x "$folder/bin/python" ] || ! fits "$folder/bin/python"; then
  create
fi
say "installing into $folder${extras:+ with extras $extras} (a few hundred MB the first time; sizes: docs/install.md)"
install

case ",$extras," in
  *,gpu,*)
    "$folder/bin/python" -c 'import sys, jax; sys.exit(jax.devices()[0].platform != "gpu")' || {
      say "the CUDA build is installed but JAX finds no NVIDIA GPU: check nvidia-smi (driver 580 or newer for CUDA 13)"
      exit 1
    }
    ;;
esac
