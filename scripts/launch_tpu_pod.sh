#!/usr/bin/env bash
# Trains on a Cloud TPU slice: makes (or reuses) it, installs, starts the command on all workers,
# follows the log, and begins again after a preemption: deletes the slice, makes it, goes on.
#
#   scripts/launch_tpu_pod.sh --name=NAME --zone=ZONE --type=v5litepod-16 [options] -- \
#     python scripts/train_sft.py --config=configs/sft.py:llava15_7b --workdir=gs://BUCKET/sft ...
#
#   --project=ID       default: gcloud's
#   --version=RUNTIME  TPU VM image; default v2-alpha-tpuv5-lite (v5e); v5p: v2-alpha-tpuv5
#   --spot             cheaper, may be preempted at any time
#   --queued           wait in line with a queued resource, rather than fail if there are no free TPUs
#   --setup=COMMAND    runs on every worker after the installation, such as a mount
#   --restarts=N       how often to begin again at most; default 100
#   --poll=SECONDS     between looks at the slice's state; default 30
#   --delete           delete the slice at the end; otherwise it stays for the next command, and costs
#   --dry-run          print every command instead of running it
#
# What is committed of the repository is copied (git archive HEAD). All that the command names must
# be reachable from every worker under the same path, and --workdir be shared by all.
# The exit code is the training command's.
set -euo pipefail

die() {
  echo "error: $1" >&2
  exit 2
}

name='' zone='' type='' project='' version=v2-alpha-tpuv5-lite setup='' restarts=100 poll=30
spot='' queued='' delete_after='' dry_run=''
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --setup=*) setup=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --spot) spot=yes ;;
    --queued) queued=yes ;;
    --delete) delete_after=yes ;;
    --dry-run) dry_run=yes ;;
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
      exit 0
      ;;
    --)
      shift
      break
      ;;
    *) die "unknown option $1; --help lists them, and the command comes after --" ;;
  esac
  shift
done
[[ $name && $zone && $type ]] || die "--name, --zone and --type are needed; --help explains them"
(($#)) || die "the training command is missing; it comes after --"
[[ $restarts =~ ^[0-9]+$ ]] || die "--restarts=$restarts is not a number"
printf -v command '%q ' "$@"
cd "$(dirname "$0")/.."

where=("--zone=$zone")
[[ $project ]] && where+=("--project=$project")
vm=(gcloud compute tpus tpu-vm)
archive=${TMPDIR:-/tmp}/vlalign_jax-$name.tar.gz

# Runs a command, or prints it so that a shell can run it.
run() {
  if [[ ! $dry_run ]]; then
    "$@"
    return
  fi
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+="$word "
  done
  echo "${line% }"
}

say() { echo "# $1" >&"$([[ $dry_run ]] && echo 1 || echo 2)"; }

# ssh notices within a minute that a worker is gone.
on() {
  run "${vm[@]}" ssh "$name" "${where[@]}" "--worker=$1" "--command=$2" -- \
    -o ServerAliveInterval=15 -o ServerAliveCountMax=4
}

state() { "${vm[@]}" describe "$name" "${where[@]}" '--format=value(state)' 2>/dev/null || true; }

create() {
  if [[ $queued ]]; then
    run gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${where[@]}" \
      "--accelerator-type=$type" "--runtime-version=$version" ${spot:+--spot}
  else
    run "${vm[@]}" create "$name" "${where[@]}" "--accelerator-type=$type" "--version=$version" \
      ${spot:+--spot}
  fi
}

delete() {
  if [[ $queued ]]; then
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  else
    run "${vm[@]}" delete "$name" "${where[@]}" --quiet
  fi
}

# Returns when there is a slice that is ready; fails if it cannot be made, or is lost meanwhile.
ensure() {
  local now
  now=$(state)
  case $now in
    READY | CREATING | STARTING | RESTARTING | REPAIRING) ;;
    '') create || return ;;
    *)
      say "$name is $now: deleted and made again"
      delete && create || return
      ;;
  esac
  while :; do
    now=$(state)
    case $now in
      READY) return ;;
      CREATING | STARTING | RESTARTING | REPAIRING) ;;
      '') [[ $queued ]] || return ;;
      *) return 1 ;;
    esac
    say "waiting for $name"
    sleep "$poll"
  done
}

# Python of the VM images is older than 3.11, so uv brings one.
install() {
  local jax
  jax=$(sed -n 's/^jax==//p' requirements.txt)
  run git archive --format=tar.gz "--output=$archive" HEAD || return
  run "${vm[@]}" scp "$archive" "$name:vlalign_jax.tar.gz" "${where[@]}" --worker=all || return
  on all "mkdir -p vlalign_jax && tar -xzf vlalign_jax.tar.gz -C vlalign_jax && cd vlalign_jax &&
python3 -m pip install --quiet --user uv && { [ -d .venv ] || python3 -m uv venv --python 3.12 .venv; } &&
python3 -m uv pip install --quiet -r requirements.txt 'jax[tpu]==$jax'" || return
  if [[ $setup ]]; then on all "$setup"; fi
}

# Starts the command on all workers, detached, so that it outlives a lost connection.
start() {
  on all "cd vlalign_jax && { ! [ -f run.pid ] || kill -9 -- -\$(cat run.pid) 2>/dev/null || true; } &&
rm -f run.exit && . .venv/bin/activate && export PYTHONUNBUFFERED=1 &&
{ setsid nohup bash -c ${inner@Q} > run.log 2>&1 < /dev/null & echo \$! > run.pid; }"
}
inner="$command; echo \$? > run.exit.partial; mv run.exit.partial run.exit"

# Shows process 0's log until it ends. 254: it ended without leaving an exit code, 255: ssh failed,
# 143: it was asked to stop, and has saved.
follow() {
  on 0 "cd vlalign_jax && tail -n +1 -s 0.5 -F --pid=\$(cat run.pid) run.log 2>/dev/null
if tail -n 5 run.log | grep -q 'SIGTERM: saved at step'; then exit 143; fi
exit \$(cat run.exit || echo 254)"
}

if [[ $dry_run ]]; then
  say "unless this says READY, which reuses the slice:"
  run "${vm[@]}" describe "$name" "${where[@]}" '--format=value(state)'
  create
  install
  start
  follow
  say "after a preemption, up to $restarts times: these two, and again from the copy on"
  delete
  create
  if [[ $delete_after ]]; then
    say "at the end"
    delete
  fi
  exit 0
fi

installed='' running='' code=1
for ((attempt = 0; attempt <= restarts; attempt++)); do
  if ((attempt)); then sleep "$poll"; fi
  if [[ $(state) != READY ]]; then
    installed='' running=''
    ensure || continue
  fi
  if [[ ! $installed ]]; then
    install || continue
    installed=yes
  fi
  if [[ ! $running ]]; then
    start || continue
    running=yes
  fi
  code=0
  follow || code=$?
  if ((code != 255)); then running=''; fi
  # 1 to 127 is an error of its own, which would come again; but not where a worker has gone.
  if ((code < 128)) && [[ $(state) == READY ]]; then break; fi
  say "ended with $code; begins again from the newest checkpoint"
done
if [[ $delete_after ]]; then delete; fi
exit "$code"
