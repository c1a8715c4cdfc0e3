#!/usr/bin/env bash
# All that a GPU is wanted for, in one command of less than nine minutes; no network:   bash tests/gpu_day.sh
# Results: gpu_day.json and gpu_day.txt, written as they come. See gpu_day.py for what it does; PYTHON names the Python.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname -- "${BASH_SOURCE[0]}")/gpu_day.py" "$@"
