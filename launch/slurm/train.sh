#!/usr/bin/env bash
# Train on the GPUs of several nodes under Slurm, and go on by itself when the time of a job is over.
#
#     sbatch --nodes=2 launch/slurm/train.sh --config=configs/sct_sc.py --workdir=RUN ...
#
# Submit from the root of the clone, in the environment that holds jax[cuda12]. Options of sbatch given on the command
# line win over those below. launch/slurm/README.md explains.
#SBATCH --job-name=sct
#SBATCH --nodes=1
#SBATCH --gres=gpu:4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=sct-%j.log

set -uo pipefail

workdir=""
for word in "$@"; do
  case "$word" in
    --workdir=*) workdir="${word#--workdir=}" ;;
    --workdir) echo "error: write --workdir=FOLDER, in one word." >&2; exit 1 ;;
  esac
done
if [[ -z "$workdir" ]]; then
  echo "error: --workdir=FOLDER is missing: name a run folder on a file system that all nodes share." >&2
  exit 1
fi

# JAX reserves 75% of a GPU's memory by default; nothing else runs here.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
# Proxies for the outer world keep the processes from finding each other.
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY

# The tasks are asked to stop, not this script, which must outlive them to put the job back into the queue.
trap '' TERM

# One task per GPU, every task seeing all GPUs of its node: JAX takes the one with the task's local number. (With
# --gpus-per-task each task would see one GPU only, and tasks could not reach each other's directly.)
# srun's own status is the highest of all tasks, so a mistake that one task found (1) hides behind the others, which
# lost it (75) or were killed: what srun says of each task is kept.
said="$(mktemp)"
{
  srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m launch.train --multihost "$@" 2>&1 >&3 | tee "$said" >&2
  status=${PIPESTATUS[0]}
} 3>&1
node_lost=$(grep -c '^srun: error: Node failure on ' "$said")
mistakes=$(grep -cE '^srun: error: .*tasks? .*: Exited with exit code 1$' "$said")
rm -f "$said"
if ((node_lost)); then
  status=75
elif ((mistakes)); then
  status=1
fi

# Statuses of launch.train: 75 asks for the same command again; more than 128 is a death by signal.
case "$status" in
  0) echo "ended: nothing is left to do" && exit 0 ;;
  1) echo "error: a mistake or a diverged loss, which starting again does not mend: read the error above." >&2 && exit 1 ;;
  130) echo "stopped by SIGINT, and saved: submit the job again to go on" && exit 130 ;;
  253) echo "error: a node's memory is used up: ask for more (--mem) or take smaller batches." >&2 && exit 253 ;;
esac
if ((status != 75 && status < 128)); then
  echo "error: ended with status $status, which starting again does not mend: read the error above." >&2
  exit "$status"
fi
if ((${SLURM_RESTART_COUNT:-0} >= 20)); then
  echo "error: ended with status $status after 20 restarts: read the log, then submit the job again to go on." >&2
  exit "$status"
fi
echo "not finished (status $status): back into the queue, to go on from the last checkpoint"
scontrol requeue "$SLURM_JOB_ID"
