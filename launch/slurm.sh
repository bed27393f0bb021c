#!/usr/bin/env bash
# Trains on the GPUs of a Slurm cluster: one task per GPU, which JAX recognises by itself.
#
#   launch/slurm.sh submit --nodes=2 --gpus=8 --time=24:00:00 --workdir=/scratch/me/tri-390m \
#                          -- --config=configs/trilm.py:390m --config.data.sets=/scratch/me/data/web
#
# Actions:
#   submit   hands the job to sbatch
#   job      what the job does: srun until the run is done. Called by sbatch, not by you.
# Options (each also as an environment variable, --time as SPECTRA_TIME):
#   --workdir=DIR     on a disk that all nodes share; needed
#   --nodes=1 --gpus=8    nodes, and GPUs in each: take whole nodes, since JAX counts the GPUs of a node from 0
#   --time=24:00:00   of one job; 120 s before its end the state is saved and the job queued again, until done
#   --partition=P --account=A    where the cluster asks for them
#   --name=NAME       of the job; default: that of the config
#   --venv=DIR        environment in which spectra[cuda] is installed; default: that of the calling shell
#   --tries=5         failures in a row without a new checkpoint before the job gives up
#   --dry-run         print the commands, run nothing
# Everything after -- goes to `spectra train`. Preempted and failed nodes: Slurm queues the job again (--requeue).
# `scancel -n NAME` ends it: the state is saved within the cluster's KillWait, or else the last checkpoint counts.
#
# NO CLUSTER HAS BEEN REACHED WITH THIS YET: only dry runs and runs with stubs in place of sbatch, srun and scontrol.
set -euo pipefail
source "$(dirname "$0")/common.sh"

action=${1:-}
[[ $action ]] || die "which action? submit (or job, in a job); see --help"
[[ $action == --* ]] || shift
nodes=${SPECTRA_NODES:-1}
gpus=${SPECTRA_GPUS:-8}
time=${SPECTRA_TIME:-24:00:00}
partition=${SPECTRA_PARTITION:-}
account=${SPECTRA_ACCOUNT:-}
venv=${SPECTRA_VENV:-${VIRTUAL_ENV:-}}
parse "nodes gpus time partition account venv" "" "$@"
need_config
name_run
need workdir "$workdir" "/scratch/$name"
root=$(cd "$(dirname "$0")/.." && pwd)

submit() {
  local job
  job=$(quoted exec bash "$root/launch/slurm.sh" job --name="$name" --workdir="$workdir" --venv="$venv" \
    --tries="$tries" -- "${train_args[@]}")
  run mkdir -p "$workdir"
  # All GPUs of a node are visible to each of its tasks: JAX gives task k the k-th. (--gpus-per-task=1 would show each
  # task one, and JAX would still look for the k-th.) The signal goes to the tasks, not to the script of the job.
  run sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" --exclusive \
    --time="$time" --requeue --signal=TERM@120 --output="$workdir/slurm-%j.log" --open-mode=append --chdir="$root" \
    ${partition:+--partition="$partition"} ${account:+--account="$account"} --wrap="$job"
}

job() {
  local status=0
  after_signal=leave
  until_done run srun --gpu-bind=none --kill-on-bad-exit=1 "${venv:+$venv/bin/}spectra" train --distributed \
    --workdir="$workdir" "${train_args[@]}" || status=$?
  # 75: the end of the job's time is near. Where the script got the signal too, it was scancel: nothing is queued.
  if ((status == 75)) && [[ ! $stopping ]]; then
    run scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$status"
}

case $action in
  submit | job) "$action" ;;
  *) die "unknown action '$action'; there are submit and job" ;;
esac
