#!/usr/bin/env bash
# Trains on a Cloud TPU slice of any number of hosts, got as a queued resource. What the hosts do is tpu_worker.sh.
#
#   launch/tpu_vm.sh up --project=P --zone=us-east5-a --accelerator-type=v5p-128 --spot --bucket=B \
#                       -- --config=configs/trilm.py:3.9b --config.data.sets=/mnt/spectra/data/web
#
# Actions:
#   up      create, wait until ACTIVE, setup, run; after a preemption delete and all of it again (the run resumes from
#           its workdir); delete when the run is finished. A run that has given up leaves the TPU, to be looked at.
#   create, setup, run, tail (the log of worker 0), stop (saves the state), delete: its parts
# Options (each also as an environment variable, --zone as SPECTRA_ZONE):
#   --project=P --zone=Z --accelerator-type=TYPE    where and what; needed
#   --bucket=B              mounted by gcsfuse at /mnt/spectra on every host; or give --workdir on a shared disk
#   --name=NAME             of queued resource, node and run; default: that of the config
#   --workdir=DIR           default: /mnt/spectra/NAME
#   --runtime-version=V     default: by the accelerator, see below
#   --spot                  cheap and preemptible     --valid-until-duration=6h   leave the queue after so long
#   --repository=URL --commit=HASH   what the hosts install; default: origin and HEAD of this checkout
#   --tries=5               failures in a row without a new checkpoint before a host gives up
#   --poll-seconds=60       how often `up` looks
#   --dry-run               print the commands (of `up`: those of a run with no preemption), run nothing
# Everything after -- goes to `spectra train`.
#
# NO POD HAS BEEN REACHED WITH THIS YET: only dry runs and runs with a stub in place of gcloud. A workdir on a bucket is
# not tested either: through gcsfuse the lock on the workdir holds within one host only, so start a run once. Make the
# bucket with hierarchical namespace, where renaming a folder, which completes a checkpoint, is one operation.
set -euo pipefail
source "$(dirname "$0")/common.sh"

action=${1:-}
[[ $action ]] || die "which action? up, create, setup, run, tail, stop or delete; see --help"
[[ $action == --* ]] || shift
project=${SPECTRA_PROJECT:-}
zone=${SPECTRA_ZONE:-}
accelerator_type=${SPECTRA_ACCELERATOR_TYPE:-}
bucket=${SPECTRA_BUCKET:-}
runtime_version=${SPECTRA_RUNTIME_VERSION:-}
spot=${SPECTRA_SPOT:-}
valid_until_duration=${SPECTRA_VALID_UNTIL_DURATION:-}
repository=${SPECTRA_REPOSITORY:-$(git -C "$(dirname "$0")" remote get-url origin 2> /dev/null || true)}
commit=${SPECTRA_COMMIT:-$(git -C "$(dirname "$0")" rev-parse HEAD 2> /dev/null || true)}
poll_seconds=${SPECTRA_POLL_SECONDS:-60}
parse "project zone accelerator-type bucket runtime-version valid-until-duration repository commit poll-seconds" \
  "spot" "$@"
name_run
need project "$project" my-project
need zone "$zone" us-east5-a
where=(--project="$project" --zone="$zone")

check_create() {
  need accelerator-type "$accelerator_type" v5p-128
  # Recalled, not asked for: --runtime-version overrides it, `gcloud compute tpus versions list` prints what there is.
  case $accelerator_type in
    v4-*) : "${runtime_version:=tpu-ubuntu2204-base}" ;;
    v5litepod-*) : "${runtime_version:=v2-alpha-tpuv5-lite}" ;;
    v5p-*) : "${runtime_version:=v2-alpha-tpuv5}" ;;
    v6e-*) : "${runtime_version:=v2-alpha-tpuv6e}" ;;
    *) need runtime-version "$runtime_version" v2-alpha-tpuv5 ;;
  esac
}

check_setup() {
  need repository "$repository" https://github.com/someone/spectra_jax
  need commit "$commit" 6f88050
  [[ $workdir ]] || need bucket "$bucket" my-bucket
}

check_run() {
  need_config
  [[ $workdir ]] || need bucket "$bucket" my-bucket
}
create() {
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" \
    --accelerator-type="$accelerator_type" --runtime-version="$runtime_version" ${spot:+--spot} \
    ${valid_until_duration:+--valid-until-duration="$valid_until_duration"}
}
state() {
  run gcloud compute tpus queued-resources list "${where[@]}" --filter="name~/$name\$" --format="value(state.state)"
}
delete() { run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet; }

on() { # on WORKERS COMMAND
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}
worker=spectra_jax/launch/tpu_worker.sh # in the home folder of each host
setup() {
  on all "test -d spectra_jax || git clone -q $(quoted "$repository") spectra_jax; cd spectra_jax && git fetch -q &&\
 git checkout -q $(quoted "$commit") && bash launch/tpu_worker.sh setup $(quoted --bucket="$bucket")"
}
start() {
  on all "bash $worker start $(quoted --name="$name" --workdir="${workdir:-/mnt/spectra/$name}" --tries="$tries" \
    -- "${train_args[@]}")"
}
statuses() { on all "test ! -e $worker && echo absent || bash $worker status --name=$name"; }

# Looks at what is there and does what comes next; it keeps nothing in mind, so that it can be started again itself.
up() {
  local found
  while true; do
    found=$(state) || found=UNKNOWN # the service did not answer
    case $found in
      "") create ;;
      ACTIVE)
        case $(statuses || true) in
          *absent*) { setup && start; } || say "not all hosts have started; trying again" ;;
          "" | *running*) ;; # or no host was reached
          *"finished "[!0]*) die "the run has given up; see: $0 tail; the TPU is left as it is" ;;
          *"finished 0"*) delete; return ;;
        esac ;;
      FAILED | SUSPENDED) say "$name is $found: deleted, and asked for again"; delete; continue ;;
    esac
    sleep "$poll_seconds"
  done
}

case $action in
  up)
    check_create; check_setup; check_run
    if [[ $dry_run ]]; then create; state; setup; start; statuses; delete; else up; fi ;;
  create) check_create; create ;;
  setup) check_setup; setup ;;
  run) check_run; start ;;
  tail) on 0 "tail -n 100 -F spectra-logs/$name.log" ;;
  stop) on all "bash $worker stop --name=$name" ;;
  delete) delete ;;
  *) die "unknown action '$action'; there are up, create, setup, run, tail, stop, delete" ;;
esac
