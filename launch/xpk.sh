#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster through xpk (https://github.com/AI-Hypercomputer/xpk; options as of 1.16).
#
#   launch/xpk.sh create --project=P --zone=us-east5-a --cluster=C --tpu-type=v5p-128 --slices=2 --docker-image=IMAGE \
#                        --bucket=B -- --config=configs/trilm.py:3.9b --config.data.sets=/mnt/spectra/data/web
#
# Actions:
#   storage   once per cluster: mounts the bucket at /mnt/spectra in every workload
#   create    starts the workload: with the same workdir it resumes
#   list      the workloads of the cluster
#   delete    the workload; it gets a SIGTERM and saves its state
# Options (each also as an environment variable, --tpu-type as SPECTRA_TPU_TYPE):
#   --project=P --zone=Z --cluster=C      needed
#   --tpu-type=TYPE --slices=1            several slices: replicas, --config.mesh.slice is set
#   --docker-image=IMAGE                  one in which spectra is installed and the configs are in its folder; or
#   --base-docker-image=IMAGE             one with Python 3.11 or later: xpk adds this checkout, each start installs it
#   --bucket=B                            for `storage`, and to say that the workdir is in it; or give --workdir
#   --name=NAME                           of workload and run; default: that of the config
#   --workdir=DIR                         default: /mnt/spectra/NAME
#   --max-restarts=100                    by the cluster: after a preemption, a dead node, or any status but 2
#   --spot                                where the cluster makes its nodes as they are asked for
#   --dry-run                             print the commands, run nothing
# Everything after -- goes to `spectra train`.
#
# NO CLUSTER HAS BEEN REACHED WITH THIS YET: only dry runs and runs with a stub in place of xpk. A workdir on a bucket
# is not tested either: through gcsfuse the lock on the workdir holds within one host only, so start a run once. Make
# the bucket with hierarchical namespace, where renaming a folder, which completes a checkpoint, is one operation.
set -euo pipefail
source "$(dirname "$0")/common.sh"

action=${1:-}
[[ $action ]] || die "which action? storage, create, list, delete; see --help"
[[ $action == --* ]] || shift
project=${SPECTRA_PROJECT:-}
zone=${SPECTRA_ZONE:-}
cluster=${SPECTRA_CLUSTER:-}
tpu_type=${SPECTRA_TPU_TYPE:-}
slices=${SPECTRA_SLICES:-1}
docker_image=${SPECTRA_DOCKER_IMAGE:-}
base_docker_image=${SPECTRA_BASE_DOCKER_IMAGE:-}
bucket=${SPECTRA_BUCKET:-}
max_restarts=${SPECTRA_MAX_RESTARTS:-100}
spot=${SPECTRA_SPOT:-}
parse "project zone cluster tpu-type slices docker-image base-docker-image bucket max-restarts" "spot" "$@"
need project "$project" my-project
need zone "$zone" us-east5-a
need cluster "$cluster" my-cluster
where=(--project="$project" --zone="$zone" --cluster="$cluster")

storage() {
  need bucket "$bucket" my-bucket
  # Nothing is cached: the hosts must see each other's files. xpk asks for a size, which gcsfuse does not use.
  run xpk storage attach "$bucket" "${where[@]}" --type=gcsfuse --bucket="$bucket" --size=1 \
    --mount-point=/mnt/spectra --readonly=false --auto-mount=true \
    --mount-options=implicit-dirs,metadata-cache:ttl-secs:0
}

create() {
  local image train
  need_config
  name_run
  need tpu-type "$tpu_type" v5p-128
  [[ $workdir ]] || need bucket "$bucket" my-bucket
  [[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices is not a number from 1 up"
  train=(spectra train --distributed --workdir="${workdir:-/mnt/spectra/$name}")
  ((slices == 1)) || train+=(--config.mesh.slice="$slices")
  # exec: the signal that ends a pod is to reach the training, and no shell above it.
  train=("exec $(quoted "${train[@]}" "${train_args[@]}")")
  if [[ $docker_image ]]; then
    image=(--docker-image="$docker_image")
  else
    need docker-image "$base_docker_image" "gcr.io/$project/spectra"
    image=(--base-docker-image="$base_docker_image" --script-dir="$(cd "$(dirname "$0")/.." && pwd)")
    train=("pip install -q -e '.[tpu]' && ${train[0]}")
  fi
  # Restarts of all pods together are the job set's work, so no loop runs in them: it restarts after signals by itself.
  run xpk workload create "${where[@]}" --workload="$name" --tpu-type="$tpu_type" --num-slices="$slices" \
    "${image[@]}" ${spot:+--spot} --max-restarts="$max_restarts" --restart-on-exit-codes=1,75 \
    --termination-grace-period-seconds=300 --command="${train[0]}"
}

case $action in
  storage | create) "$action" ;;
  list) run xpk workload list "${where[@]}" ;;
  delete)
    name_run
    run xpk workload delete "${where[@]}" --workload="$name" ;;
  *) die "unknown action '$action'; there are storage, create, list, delete" ;;
esac
