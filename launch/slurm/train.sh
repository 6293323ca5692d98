#!/usr/bin/env bash
# Train on the GPUs of several nodes with Slurm. The job restarts automatically after its time limit.
#
#     sbatch --nodes=2 launch/slurm/train.sh --config=configs/sct_sc.py --workdir=RUN ...
#
# Submit from the root of the clone, in the environment with jax[cuda12]. Options of sbatch on the command line override
# those below. See launch/slurm/README.md.
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
    --workdir) echo "error: write --workdir=FOLDER, in one word." >&2; exit 2 ;;
  esac
done
if [[ -z "$workdir" ]]; then
  echo "error: --workdir=FOLDER is missing: name a run folder on a file system that all nodes share." >&2
  exit 2
fi

# By default JAX reserves 75% of the GPU memory. No other program runs here, so it can use more.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
# With proxy settings, the processes cannot connect to each other.
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY

# SIGTERM goes to the tasks, not to this script, which must outlive them to queue the job again.
trap '' TERM

# There is one task per GPU, and every task sees all GPUs of its node. JAX uses the GPU with the local rank of the task.
# (With --gpus-per-task, each task would see only one GPU, and GPUs could not access each other directly.)
# srun returns the highest status of all tasks. An error in one task (1 or 2) would be hidden by the other tasks, which lost
# that task (75) or were killed. Therefore the script reads the status of each task from srun's messages.
said="$(mktemp)"
{
  srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m launch.train --multihost "$@" 2>&1 >&3 | tee "$said" >&2
  status=${PIPESTATUS[0]}
} 3>&1
node_lost=$(grep -c '^srun: error: Node failure on ' "$said")
mistakes=$(grep -cE '^srun: error: .*tasks? .*: Exited with exit code [12]$' "$said")
rm -f "$said"
if ((node_lost)); then
  status=75
elif ((mistakes)); then
  status=1
fi

# Exit statuses of launch.train: 75 means run the same command again; above 128 means killed by a signal.
case "$status" in
  0) echo "ended: nothing is left to do" && exit 0 ;;
  1 | 2)
    echo "error: a mistake or a diverged loss, which starting again does not mend: read the error above." >&2
    exit "$status"
    ;;
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
