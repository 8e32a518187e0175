#!/usr/bin/env bash
# Trains on a set that is drawn here: a tiny LLaVA with random weights learns to answer questions
# about pictures (SFT), answers about pictures that it never saw, and is exported.
# With --all the whole road: the same SFT with the pictures blanked, for comparison; a reward model
# and DPO from ranked answers; PPO from an early checkpoint of SFT, as the last one leaves it
# nothing to gain.
# Ends with exit code 1 if a stage has not learned what it should.
# usage: bash scripts/demo.sh [--all] [DIRECTORY]     (default runs/demo, which is made anew)
set -euo pipefail
all=0
if [ "${1:-}" = --all ]; then
  all=1
  shift
fi
out=${1:-}
if [ $# -gt 1 ] || [ "${out#-}" != "$out" ]; then
  echo "usage: bash scripts/demo.sh [--all] [DIRECTORY]" >&2
  exit 1
fi
case $out in
  "" | /*) ;;
  *) out=$PWD/$out ;;
esac
cd "$(dirname "$0")/.."
if [ -z "$out" ]; then
  out=runs/demo
  rm -rf runs/demo
elif [ -e "$out" ] && [ -n "$(ls -A "$out")" ]; then
  echo "error: $out is not empty; name another directory or empty it" >&2
  exit 1
fi
. scripts/environment.sh requirements.txt
export JAX_PLATFORMS=cpu
# Many of these processes run the same programs.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/compiled}
mkdir -p "$out/logs"
start=$SECONDS stage=0 stages=$((all ? 8 : 4)) watcher="" failed=0
trap '[ -z "$watcher" ] || kill "$watcher" 2>/dev/null || true' EXIT

heading() { # TITLE DURATION: begins a stage
  stage=$((stage + 1)) began=$SECONDS
  printf '\n[%d/%d] %s (about %s on two cores)\n' "$stage" "$stages" "$1" "$2"
}
last_progress() { # LOG: shows where it is now, until it is killed
  while sleep 1; do
    printf '\r\033[K%s' "$(tail -c 500 "$1" | tr '\r' '\n' | grep -o '[0-9]*/[0-9]* \[.*' |
      tail -n 1 | cut -c 1-70)"
  done
}
logged() { # NAME COMMAND...: runs a command whose messages go to a log; shows them if it fails
  local log=$out/logs/$1.log status=0
  shift
  if [ -t 1 ]; then
    touch "$log"
    last_progress "$log" &
    watcher=$!
  fi
  "$@" >"$log" 2>&1 || status=$?
  if [ -n "$watcher" ]; then
    kill "$watcher" 2>/dev/null || true
    watcher=""
    printf '\r\033[K'
  fi
  if [ "$status" -ne 0 ]; then
    tail -n 20 "$log" >&2
    echo "error: this stage failed; all its messages are in $log" >&2
    exit "$status"
  fi
}
result() { # STAGE: shows what it has learned, and whether that is enough
  python scripts/demo_result.py "$out" "$1" || failed=1
  echo "($((SECONDS - began)) s)"
}
train() { # STAGE NAME START RECORDS [FLAGS]: one training run
  local stage=$1 name=$2 from=$3 records=$4
  shift 4
  logged "$name" python "scripts/train_$stage.py" --config="configs/$stage.py:demo" \
    --workdir="$out/$name" --config.model.init_from="$from" --config.data.images="$out/data/images" \
    --config.data.train="$out/data/${records}train.json" \
    --config.data.eval="$out/data/${records}eval.json" "$@"
  result "$name"
}

heading "Draw pictures, questions and answers, and make a LLaVA with random weights" "20 s"
logged data python scripts/make_demo.py --output="$out/data"
tail -n 1 "$out/logs/data.log"

heading "SFT: the model learns from conversations about the pictures" "$((all ? 3 : 2)) min"
if [ "$all" -eq 0 ]; then
  train sft sft "$out/data/model" "" --config.num_train_epochs=5
else
  # PPO starts from one of its checkpoints.
  train sft sft "$out/data/model" "" --config.save_every=25 --config.save_total_limit=40
fi

if [ "$all" -eq 0 ]; then
  heading "Predict: it answers questions about pictures that it never saw" "30 s"
  logged answers python scripts/predict.py --config=configs/predict.py --workdir="$out/answers" \
    --config.model.init_from="$out/sft" --config.model.dtype=float32 --config.batch_size=100 \
    --config.data.eval="$out/data/preferences_eval.json" --config.data.images="$out/data/images" \
    --config.generation.max_new_tokens=16
  result answers
  best=sft gallery=answers
else
  heading "SFT without seeing: the same with gray pictures, for one epoch" "1 min"
  # There is nothing more to learn after that.
  train sft sft_blind "$out/data/model" "" --config.data.blank_images=true \
    --config.num_train_epochs=1

  heading "Reward: a model learns from ranked answers to score them" "3 min"
  train reward reward "$out/sft" preferences_

  heading "DPO: the policy learns from ranked answers" "1 min"
  train dpo dpo "$out/sft" preferences_

  heading "PPO: an early policy answers, is scored by the reward model, and learns" "3 min"
  train ppo ppo "$out/sft/checkpoints/175" preferences_ --config.ppo.reward_model="$out/reward"

  heading "Predict: all policies answer questions about pictures that they never saw" "1 min"
  logged policies python scripts/demo_policies.py --demo="$out"
  result policies
  best=ppo gallery=answers_ppo
fi

heading "Export: the model in Hugging Face's layout" "10 s"
logged export python scripts/export_hf.py --checkpoint="$out/$best" --output="$out/export"
echo "the model: $out/export"
echo "its answers with pictures: $out/$gallery/gallery.html"
printf '\n%s s in all\n' $((SECONDS - start))
exit $failed
