#!/usr/bin/env bash
# What the launch scripts share; to be sourced.
#   parse "OPTIONS" "FLAGS" "$@"   --name=value and --flag into variables; what follows -- into train_args
#   need NAME VALUE EXAMPLE        ends with status 2 and one line where VALUE is empty
#   run CMD...                     prints the command, and executes it unless --dry-run is given
#   name_run, need_config          the stable name of the run; that there is a config to train
#   until_done CMD...              restarts a training command until it exits 0
# Every option has a variable of the environment as its default: --tpu-type is SPECTRA_TPU_TYPE.

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || { echo "launch scripts need bash 4.4 or later" >&2; exit 2; }

name=${SPECTRA_NAME:-}
workdir=${SPECTRA_WORKDIR:-}
tries=${SPECTRA_TRIES:-5}                # failures in a row without a new checkpoint, after which until_done gives up
wait_seconds=${SPECTRA_WAIT_SECONDS:-10} # before the second try; doubled for each one after it
after_signal=restart                     # what until_done does where a signal stopped the run: restart, or leave
dry_run=
train_args=()

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$@"; exit 2; }

need() {
  local variable=${1//-/_}
  [[ $2 ]] || die "--$1 is missing; for example --$1=$3 (or SPECTRA_${variable^^})"
}

# The comment at the head of a script is its help.
usage() {
  local line
  while IFS= read -r line && [[ $line == "#"* ]]; do
    [[ $line == "#!"* ]] || printf '%s\n' "${line#\#}"
  done < "$0"
}

parse() {
  local options=" $1 name workdir tries wait-seconds " flags=" $2 dry-run " key
  local unknown="; see --help (what is for spectra train goes after --)"
  shift 2
  while (($#)); do
    key=${1%%=*} key=${key#--}
    case $1 in
      --) train_args=("${@:2}"); return ;;
      --help) usage; exit 0 ;;
      --*=*)
        [[ $options == *" $key "* ]] || die "unknown option --$key$unknown"
        printf -v "${key//-/_}" %s "${1#*=}" ;;
      --*)
        [[ $options != *" $key "* ]] || die "--$key has no value; write --$key=VALUE"
        [[ $flags == *" $key "* ]] || die "unknown option --$key$unknown"
        printf -v "${key//-/_}" %s 1 ;;
      *) die "unexpected argument '$1'$unknown" ;;
    esac
    shift
  done
}

# The words of a command as a shell reads them back.
quoted() {
  local word text=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    text+=" $word"
  done
  printf '%s\n' "${text# }"
}

run() {
  if [[ $dry_run ]]; then
    quoted "$@"
  else
    printf '+ %s\n' "$(quoted "$@")" >&2
    "$@"
  fi
}

need_config() {
  [[ " ${train_args[*]}" == *" --config="* ]] || die "no config to train; for example -- --config=configs/trilm.py:3.9b"
}

# --name, or the config's: configs/trilm.py:3.9b is trilm-3-9b. Nothing in it is random or a date, so that the same
# command finds the same machines and the same workdir again.
name_run() {
  local arg
  for arg in "${train_args[@]}"; do
    [[ ! $name && $arg == --config=* ]] || continue
    name=${arg##*/} name=${name#--config=} name=${name/.py/} name=${name,,} name=${name//[^a-z0-9]/-}
  done
  need name "$name" trilm-3-9b
  [[ $name =~ ^[a-z][a-z0-9-]{0,38}$ && $name != *- ]] ||
    die "--name=$name: the clouds take at most 39 of a-z, 0-9 and -, a letter first and no - at the end"
}

# Exit status of spectra train: 75 is "stopped by a signal, state saved", 2 is an error of the user that no repetition
# mends, anything else may be a machine. The signal is not forwarded, and after it nothing is restarted: whoever means
# this loop signals its process group (as Ctrl-C, a shutdown, and `tpu_worker.sh stop` do), and a second signal would
# make the training leave without saving.
until_done() {
  local failures=0 pause=$wait_seconds before now status
  stopping=
  trap 'stopping=1' TERM INT
  before=$(progress)
  while true; do
    status=0
    "$@" || status=$?
    if ((status == 0)) || [[ $stopping ]]; then return "$status"; fi
    case $status in
      2) say "exit status 2: an error of the command or the config; not tried again"; return 2 ;;
      75)
        [[ $after_signal != leave ]] || return 75
        say "exit status 75: stopped by a signal, state saved; again at once"
        continue ;;
    esac
    now=$(progress)
    [[ $now == "$before" ]] || failures=0 pause=$wait_seconds before=$now
    failures=$((failures + 1))
    if ((failures >= tries)); then
      say "exit status $status, $failures failures in a row without a new checkpoint: given up"
      return "$status"
    fi
    say "exit status $status, failure $failures of $tries without a new checkpoint; again in $pause s"
    sleep "$pause" || true # a signal ends it too
    pause=$((pause * 2 < 300 ? pause * 2 : 300))
    [[ ! $stopping ]] || return "$status"
  done
}

# What changes when a run gets on: the names of its checkpoints.
progress() { (shopt -s nullglob && cd "${workdir:-/nowhere}/checkpoints" 2> /dev/null && echo ./*) || true; }
