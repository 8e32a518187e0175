#!/usr/bin/env bash
# Trains on GPU nodes of a Slurm cluster: submits a job that starts the command on all nodes, saves
# and requeues itself ahead of the time limit, and after a preemption or a lost node.
#
#   scripts/launch_slurm.sh --nodes=4 --gpus-per-node=8 --time=24:00:00 [options] -- \
#     python scripts/train_sft.py --config=configs/sft.py:llava15_7b --workdir=/shared/runs/sft ...
#
#   --name=NAME        of the job and of its log NAME-JOB.log; default vlalign_jax
#   --per-gpu          a process for each GPU; otherwise one for each node
#   --grace=SECONDS    how long before the time limit to save; default 600
#   --restarts=N       how often the job may begin again; default 100
#   --setup=COMMAND    runs first on every node, such as `module load cuda`
#   --sbatch=OPTION    one more option of sbatch, such as --sbatch=--partition=gpu; may be repeated
#   --dry-run          print the command instead of running it
#
# Run it in the repository, on storage that all nodes share, with its environment in .venv.
set -euo pipefail

die() {
  echo "error: $1" >&2
  exit 2
}

nodes='' gpus='' time='' name=vlalign_jax per_gpu='' grace=600 restarts=100 setup=: dry_run='' more=()
while (($#)); do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus-per-node=*) gpus=${1#*=} ;;
    --time=*) time=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --grace=*) grace=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --setup=*) setup=${1#*=} ;;
    --sbatch=*) more+=("${1#*=}") ;;
    --per-gpu) per_gpu=yes ;;
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
[[ $nodes && $gpus && $time ]] || die "--nodes, --gpus-per-node and --time are needed; see --help"
(($#)) || die "the training command is missing; it comes after --"
for number in "$nodes" "$gpus" "$grace" "$restarts"; do
  [[ $number =~ ^[0-9]+$ ]] || die "$number is not a number"
done
printf -v command '%q ' "$@"
cd "$(dirname "$0")/.."

task="$setup && . .venv/bin/activate && exec $command"
options=(
  "--job-name=$name" "--nodes=$nodes" "--gpus-per-node=$gpus" "--time=$time"
  "--ntasks-per-node=$([[ $per_gpu ]] && echo "$gpus" || echo 1)"
  # To the processes, not to the script; they save and end.
  "--signal=TERM@$grace"
  --requeue "--output=$name-%j.log" --open-mode=append ${more[@]+"${more[@]}"}
)

job() {
  cat <<JOB
#!/usr/bin/env bash
cd ${PWD@Q}
log=${name@Q}-\$SLURM_JOB_ID.log
before=\$(cat "\$log" 2>/dev/null | wc -c)
export PYTHONUNBUFFERED=1
srun --kill-on-bad-exit=0 bash -c ${task@Q}
code=\$?
# The processes end one another. Exit code 1 is an error that would come again; a signal, or to have been asked to stop, is not.
if ((code > 128)) || tail -c +\$((before + 1)) "\$log" | grep -q 'SIGTERM: saved at step'; then
  if ((\${SLURM_RESTART_COUNT:-0} < $restarts)); then
    scontrol requeue "\$SLURM_JOB_ID"
  fi
fi
exit \$code
JOB
}

if [[ $dry_run ]]; then
  printf 'sbatch'
  printf ' %q' "${options[@]}"
  printf " <<'JOB'\n%s\nJOB\n" "$(job)"
else
  job | sbatch "${options[@]}"
fi
