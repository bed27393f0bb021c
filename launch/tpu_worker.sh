#!/usr/bin/env bash
# One host of a TPU slice: tpu_vm.sh calls this on every host, in the checkout that it has cloned there.
#
#   bash launch/tpu_worker.sh setup [--bucket=B]    mount the bucket at /mnt/spectra; install spectra with jax[tpu]
#   bash launch/tpu_worker.sh start --name=NAME --workdir=DIR -- --config=...    train in the background until done
#   bash launch/tpu_worker.sh status --name=NAME    one of: absent, running, finished STATUS
#   bash launch/tpu_worker.sh stop --name=NAME      stop the training and its restarts; the state is saved
#
# The log is ~/spectra-logs/NAME.log. start does nothing where the run is on already. --dry-run prints the commands.
# Only stubs have been run by it so far: no TPU host.
set -euo pipefail
source "$(dirname "$0")/common.sh"

action=${1:-}
[[ $action ]] || die "which action? setup, start, status, stop; see --help"
[[ $action == --* ]] || shift
bucket=${SPECTRA_BUCKET:-}
parse bucket "" "$@"
here=$(cd "$(dirname "$0")" && pwd)
venv=$HOME/spectra-venv
[[ $action == setup ]] || name_run
file=$HOME/spectra-logs/$name

pid() { pgrep -o -f "tpu_worker.sh loop --name=$name " || true; }

setup() {
  if [[ $bucket ]] && ! mountpoint -q /mnt/spectra; then
    command -v gcsfuse > /dev/null || install_gcsfuse
    run sudo mkdir -p /mnt/spectra
    run sudo chown "$(id -un)" /mnt/spectra
    # Nothing is cached: the hosts must see each other's files. The limit is for buckets without folders.
    run gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 "$bucket" /mnt/spectra
  fi
  # uv brings its own Python: that of the TPU images is older than 3.11.
  run python3 -m pip install -q --user uv
  run python3 -m uv venv -q --allow-existing --python=3.12 "$venv"
  run python3 -m uv pip install -q --python="$venv/bin/python" -e "${here%/launch}[tpu]"
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt source
  source="deb [signed-by=$key] $url gcsfuse-$(lsb_release -cs) main"
  run sudo curl -fsS -o "$key" "$url/doc/apt-key.gpg"
  run sudo bash -c "echo '$source' > /etc/apt/sources.list.d/gcsfuse.list"
  run sudo apt-get update -q
  run sudo apt-get install -q -y gcsfuse
}

start() {
  need workdir "$workdir" "/mnt/spectra/$name"
  need_config
  local command=(
    setsid nohup bash "$here/tpu_worker.sh" loop --name="$name" --workdir="$workdir" --tries="$tries"
    -- "${train_args[@]}"
  )
  if [[ $dry_run ]]; then
    quoted "${command[@]}"
  elif [[ $(pid) ]]; then
    say "$name is on already"
  else
    mkdir -p "${file%/*}"
    rm -f "$file.status"
    "${command[@]}" >> "$file.log" 2>&1 < /dev/null &
    say "started; the log is $file.log"
  fi
}

loop() {
  local status=0
  until_done run "$venv/bin/spectra" train --distributed --workdir="$workdir" "${train_args[@]}" || status=$?
  # A host that shuts down stops the loop: it is then absent, not finished, and is started again after a reboot.
  [[ $stopping ]] || echo "finished $status" > "$file.status"
}

status() {
  if [[ $(pid) ]]; then
    echo running
  elif [[ -e $file.status ]]; then
    cat "$file.status"
  else
    echo absent
  fi
}

stop() {
  local loop
  loop=$(pid)
  [[ ! $loop ]] || run kill -TERM -- "-$loop"
  while [[ ! $dry_run && $(pid) ]]; do sleep 1; done
}

case $action in
  setup | start | status | stop | loop) "$action" ;;
  *) die "unknown action '$action'; there are setup, start, status, stop" ;;
esac
