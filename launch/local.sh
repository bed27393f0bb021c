#!/usr/bin/env bash
# Trains in several processes on the CPUs of this machine, as the hosts of a pod do: to try, before paying for a pod,
# that a config runs distributed.
#
#   launch/local.sh --processes=2 --devices-per-process=2 -- --config=configs/trilm.py:99m --config.data.sets=data/web
#
# Options (each also as an environment variable, --port as SPECTRA_PORT):
#   --processes=2            how many
#   --devices-per-process=1  CPU devices in each
#   --name=NAME              default: that of the config
#   --workdir=DIR            default: runs/NAME
#   --port=N                 where process 0 listens; default: a free one (a dry run shows 12345)
#   --dry-run                print the commands, run nothing
# Everything after -- goes to `spectra train`. SIGTERM and Ctrl-C are passed on to every process once: they save and
# exit with status 75; the same command continues. The exit status is that of the first process that failed, or 0.
set -euo pipefail
source "$(dirname "$0")/common.sh"

processes=${SPECTRA_PROCESSES:-2}
devices_per_process=${SPECTRA_DEVICES_PER_PROCESS:-1}
port=${SPECTRA_PORT:-}
parse "processes devices-per-process port" "" "$@"
need_config
name_run
workdir=${workdir:-runs/$name}
for setting in processes devices_per_process; do
  [[ ${!setting} =~ ^[1-9][0-9]*$ ]] || die "--${setting//_/-}=${!setting} is not a number from 1 up"
done

if [[ ! $port && $dry_run ]]; then
  port=12345
elif [[ ! $port ]]; then
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi

pids=()
trap 'say "stopping all processes"; kill -TERM "${pids[@]}" 2> /dev/null || true' TERM INT
for ((k = 0; k < processes; k++)); do
  command=(
    env JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$processes" JAX_PROCESS_ID="$k"
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$devices_per_process" JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
    spectra train --distributed --workdir="$workdir" "${train_args[@]}"
  )
  if [[ $dry_run ]]; then
    printf '%s &\n' "$(quoted "${command[@]}")"
  else
    printf '+ %s &\n' "$(quoted "${command[@]}")" >&2
    set -m # a process group of its own: Ctrl-C reaches this script alone, which passes it on
    "${command[@]}" < /dev/null &
    set +m
    pids+=($!)
  fi
done
if [[ $dry_run ]]; then
  echo wait
  exit
fi

# Asked in turn, not waited for in turn: the first to fail is why the others fail after it.
first=0
while ((${#pids[@]})); do
  sleep 0.2 || true # a signal ends it too
  for k in "${!pids[@]}"; do
    kill -0 "${pids[k]}" 2> /dev/null && continue
    status=0
    wait "${pids[k]}" || status=$?
    unset "pids[k]"
    ((status == 0)) || say "process $k: exit status $status"
    ((first)) || first=$status
  done
done
exit "$first"
