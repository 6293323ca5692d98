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
srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m launch.train --multihost "$@"
status=$?

if [[ -d "$workdir/model" ]]; then
  exit "$status"  # finished: the model is exported last
fi
if (( status != 0 && ${SLURM_RESTART_COUNT:-0} >= 20 )); then
  echo "error: ended with status $status after 20 restarts: read the log before submitting it again." >&2
  exit "$status"
fi
if (( status == 1 )) && ! ls "$workdir"/checkpoints/[0-9]* > /dev/null 2>&1; then
  exit "$status"  # a mistake in the command or the data, which starting again does not mend
fi
echo "not finished (status $status): back into the queue, to go on from the last checkpoint"
scontrol requeue "$SLURM_JOB_ID"
