#!/usr/bin/env bash
# Trains one track from its data to its loss plot:   ./run.sh [track] [options of train_gpt.py…]
#
#   ./run.sh                          small where CUDA is found, else nano
#   ./run.sh nano --seed 1            on the CPU, under a minute
#   NPROC=2 ./run.sh small            two processes whatever the number of GPUs
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host ./run.sh small     on every node, each with its own NODE_RANK
#   srun --kill-on-bad-exit=1 ./run.sh small                 Slurm: every task is a process of the run
#   PYTHON=path/to/python ./run.sh    another interpreter
#
# Missing data is built or downloaded first, unless --data-dir names a folder. The exit code is that of the run.
# Under srun every task asks for the data: on a shared disk the first writes it while the others wait for its lock, on
# local disks the first of each node.
# Works in the bash 3.2 of macOS, hence the ${array[@]+"${array[@]}"}: there an empty array counts as unset.
set -euo pipefail

repo="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

say() { printf 'run.sh: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 2; }
is_count() { case $1 in '' | 0* | *[!0-9]*) return 1 ;; esac; }

# Number of GPUs that CUDA will show: those of nvidia-smi, as narrowed down by CUDA_VISIBLE_DEVICES.
count_gpus() {
  local present visible=0 device devices=()
  present=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || present=0
  if [ "$present" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    IFS=', ' read -r -a devices <<<"$CUDA_VISIBLE_DEVICES" || true
    for device in ${devices[@]+"${devices[@]}"}; do
      case $device in
        GPU-* | MIG-*) ;;
        '' | *[!0-9]*) break ;; # CUDA, too, stops at the first entry that names no GPU, such as -1
        *) [ "$device" -lt "$present" ] || break ;;
      esac
      visible=$((visible + 1))
    done
    present=$visible
  fi
  echo "$present"
}

# First host of a list such as node[1-4,7],login; fails where that takes scontrol and there is none.
first_host() {
  local hosts
  hosts=$(scontrol show hostnames "$1" 2>/dev/null) || hosts=${1%%,*}
  read -r hosts <<<"$hosts"
  case $hosts in '' | *'['*) return 1 ;; esac
  echo "$hosts"
}

count_cores() { nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1; }

# ---- what is asked for ----

track=
if [ "$#" -gt 0 ]; then
  case $1 in
    -*) ;;
    *) track=$1; shift ;;
  esac
fi

no_run='' data_dir='' device=auto previous=''
for option in "$@"; do
  case $previous in --device) device=$option ;; esac
  case $option in
    --help | --help-all | -h) no_run=yes ;;
    --plan | --scale* | --eval*) die "$option: see evals/plan.py, evals/sibling.py and evals/hellaswag.py" ;;
    --data-dir | --data-dir=* | --data_dir | --data_dir=*) data_dir=given ;;
    --device=*) device=${option#--device=} ;;
  esac
  previous=$option
done

if [ -n "${PYTHON:-}" ]; then
  python=$PYTHON
elif command -v python3 >/dev/null 2>&1; then
  python=python3
else
  python=python
fi
command -v "$python" >/dev/null 2>&1 || die "no Python interpreter '$python': install Python 3.11 or newer, or name one with PYTHON=…"
complaint=$("$python" -c '
import sys
if sys.version_info < (3, 11):
    sys.stdout.write("is Python %d.%d, expected 3.11 or newer: name another one with PYTHON=…" % sys.version_info[:2])
else:
    from importlib.util import find_spec
    missing = [name for name in ("numpy", "safetensors", "torch", "tqdm", "tyro") if find_spec(name) is None]
    if missing:
        sys.stdout.write("lacks %s: %s -m pip install -r requirements.txt" % (", ".join(missing), sys.executable))
') || die "'$python' is no Python interpreter: name another one with PYTHON=…"
[ -z "$complaint" ] || die "$python $complaint"

[ -z "$no_run" ] || exec "$python" "$repo/train_gpt.py" ${track:+"$track"} "$@"

# ---- processes: one per GPU, a number that divides the 8 rows of a step; one on the CPU and for nano ----

gpus=0
[ "$device" = cpu ] || gpus=$(count_gpus)
if [ -z "$track" ]; then
  if [ "$gpus" -gt 0 ]; then track=small; else track=nano; fi
  say "no track given: $track"
fi

case $gpus in
  0 | 1) processes=1 ;;
  2 | 3) processes=2 ;;
  4 | 5 | 6 | 7) processes=4 ;;
  *) processes=8 ;;
esac
# A step of Slurm has several tasks only where srun started them: in the script of sbatch and in the shell of salloc
# SLURM_NTASKS counts those that could be.
tasks=1
[ -z "${SLURM_STEP_ID:-}" ] || [ -n "${NNODES:-}" ] || tasks=${SLURM_STEP_NUM_TASKS:-${SLURM_NTASKS:-1}}
if [ "$tasks" -gt 1 ]; then
  [ -z "${NPROC:-}" ] || die "NPROC is '$NPROC', but srun started $tasks tasks, each of them one process: unset it, or give every task a torchrun of its own with NNODES, NODE_RANK and MASTER_ADDR"
  processes=1
  RANK=$SLURM_PROCID WORLD_SIZE=$tasks LOCAL_RANK=$SLURM_LOCALID
  [ "$gpus" -ne 1 ] || LOCAL_RANK=0 # srun --gpus-per-task=1 shows every task its own GPU alone
  hosts=${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}}
  MASTER_ADDR=${MASTER_ADDR:-$(first_host "$hosts")} || die "no scontrol to expand the nodes '$hosts': set MASTER_ADDR to the first of them"
  MASTER_PORT=${MASTER_PORT:-$((15000 + (64 * ${SLURM_JOB_ID:-0} + SLURM_STEP_ID) % 16000))} # each step has its own
  export RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT
  [ "$RANK" -eq 0 ] || exec >/dev/null # or every task would say what data it found
elif [ -n "${NPROC:-}" ]; then
  is_count "$NPROC" || die "NPROC is '$NPROC', expected a number of processes such as 1, 2, 4 or 8"
  processes=$NPROC
elif [ "$track" = nano ]; then
  processes=1 # too small to share
elif [ "$gpus" -gt 1 ] && [ "$gpus" -ne "$processes" ]; then
  say "$gpus GPUs found, using $processes of them: a step has 8 rows, which 1, 2, 4 or 8 processes share evenly"
fi

nodes=${NNODES:-1}
is_count "$nodes" || die "NNODES is '$nodes', expected a number of nodes"
if [ "$nodes" -eq 1 ] && [ "$processes" -eq 1 ]; then
  launch=("$python")
else
  # torchrun, but for its last words: a page about its processes. Here they are one line, what went wrong first.
  launch=("$python" -c '
import sys
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

try:
    run.run(run.parse_args(sys.argv[1:]))
except SignalException as end:  # rank 0 has said where the run stopped
    sys.exit(128 + end.sigval)
except ChildFailedError as error:
    # The first, in whole seconds; a rank that was killed then is why the others end. Those left torchrun ends, with
    # SIGTERM and half a minute later SIGKILL.
    first = min(failure.timestamp for failure in error.failures.values())
    soon = [(rank, failure) for rank, failure in error.failures.items() if failure.timestamp < first + 5]

    def importance(item):
        code, message = item[1].exitcode, item[1].message
        killed, speaks = code < 0 and code not in (-6, -15), isinstance(message, dict)
        return not killed, not speaks, code != -6, item[1].timestamp

    rank, failure = min(soon, key=importance)
    said = failure.message
    if isinstance(said, dict):
        sys.exit("error: " + said["message"])
    if failure.exitcode == -6:
        sys.exit(f"error: rank {rank} aborted (on GPUs: another rank hangs). See --save-every and --resume.")
    if failure.exitcode < 0:
        sys.exit(f"error: rank {rank} was killed by {failure.signal_name()}. See --save-every and --resume.")
    sys.exit(failure.exitcode)
' --nproc-per-node "$processes")
  if [ "$nodes" -eq 1 ]; then
    launch+=(--standalone)
  else
    [ -n "${NODE_RANK:-}" ] || die "NNODES is $nodes, but NODE_RANK is not set: give each node its own, 0 to $((nodes - 1))"
    is_count "1$NODE_RANK" && [ "$NODE_RANK" -lt "$nodes" ] || die "NODE_RANK is '$NODE_RANK', expected 0 to $((nodes - 1))"
    [ -n "${MASTER_ADDR:-}" ] || die "NNODES is $nodes, but MASTER_ADDR is not set: give all nodes the address of node 0"
    launch+=(--nnodes "$nodes" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
  fi
  if [ "$gpus" -eq 0 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then
    # torchrun's own default is one thread per process, which leaves most of a CPU idle.
    OMP_NUM_THREADS=$(($(count_cores) / processes))
    [ "$OMP_NUM_THREADS" -gt 0 ] || OMP_NUM_THREADS=1
    export OMP_NUM_THREADS
  fi
fi

# ---- data ----

if [ -z "$data_dir" ]; then
  case $track in
    nano) "$python" "$repo/data/nano.py" ;;
    small) "$python" "$repo/data/cached_fineweb10B.py" ;;
    medium) "$python" "$repo/data/cached_fineweb10B.py" 30 ;;
    xl) "$python" "$repo/data/cached_fineweb10B.py" 140 --dataset fineweb100B ;;
  esac # another name is no track: train_gpt.py says which there are
fi

# ---- the run ----

notes=$(mktemp -d "${TMPDIR:-/tmp}/train_gpt.XXXXXX")
trap 'rm -rf "$notes"' EXIT
export TRAIN_GPT_LOG_PATH_FILE="$notes/log_path"

# The run is a background job with a process group of its own (set -m): bash handles a signal at once only while it
# waits for a background job, and without set -m such a job would ignore Ctrl-C.
run='' signals=0 signal_code=''
forward() {
  signals=$((signals + 1)) signal_code=$2
  [ -z "$run" ] || kill -s "$1" -- "-$run" 2>/dev/null || true
}
trap 'forward INT 130' INT
trap 'forward TERM 143' TERM
trap 'forward HUP 129' HUP
set -m
"${launch[@]}" "$repo/train_gpt.py" "$track" "$@" &
run=$!
set +m
[ -z "$signal_code" ] || forward TERM "$signal_code" # it came before there was a run to forward it to
while :; do
  signals_before=$signals
  status=0
  wait "$run" || status=$?
  [ "$signals" -ne "$signals_before" ] || break # else a signal, not the end of the run, ended the wait
done
trap - INT TERM HUP

if [ "$status" -ne 0 ]; then
  [ -z "$signal_code" ] || status=$signal_code # torchrun would turn it into 1
  exit "$status"
fi

if [ -s "$TRAIN_GPT_LOG_PATH_FILE" ]; then # on the node of rank 0 only
  "$python" "$repo/records/plot.py" "$(cat "$TRAIN_GPT_LOG_PATH_FILE")" || say "the loss plot could not be drawn; the run itself is complete"
fi
