#!/usr/bin/env bash
# Train on all workers of a Cloud TPU pod slice. Runs the same command on each worker, in the background.
#
#     export TPU=NAME ZONE=ZONE
#     launch/tpu/train.sh start --config=configs/sct_sc.py --workdir=~/shared/runs/sct ...
#     launch/tpu/train.sh log          # follow worker 0
#     launch/tpu/train.sh stop         # save and stop; `start` with the same arguments resumes
#
# See launch/tpu/README.md, which also explains how to set up the workers.

set -euo pipefail

: "${TPU:?set TPU to the name of the slice}" "${ZONE:?set ZONE to its zone}"
FOLDER="${FOLDER:-sct}"     # the clone on each worker, in the home folder
PYTHON="${PYTHON:-.venv/bin/python}"

on_workers() {  # on_workers all|0 COMMAND
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$1" --command="$2"
}

action="${1:-}"
case "$action" in
  start)
    shift
    words=""
    for word in "$@"; do
      words+=" $(printf '%q' "$word")"
    done
    # JAX reads the coordinator and the worker index from the slice. `setsid` keeps the run alive after the connection
    # closes.
    on_workers all "cd $FOLDER || exit 1
      if [ -f train.pid ] && kill -0 \$(cat train.pid) 2> /dev/null; then
      echo 'error: a run is going on: stop it first.' >&2; exit 1; fi
      setsid nohup $PYTHON -m launch.train --multihost$words > train.log 2>&1 < /dev/null & echo \$! > train.pid"
    ;;
  log) on_workers 0 "tail -n 50 -f $FOLDER/train.log" ;;
  stop) on_workers all "kill -TERM \$(cat $FOLDER/train.pid)" ;;
  run)
    shift
    on_workers all "cd $FOLDER && $*"
    ;;
  *)
    echo "usage: launch/tpu/train.sh start --config=... | log | stop | run COMMAND" >&2
    exit 2
    ;;
esac
