#!/usr/bin/env bash
# The whole road on a set that is drawn here: a tiny LLaVA checkpoint with random weights learns to
# answer questions about pictures (and the same with the pictures blanked, for comparison). From
# ranked answers a reward model and DPO learn; PPO improves a policy that has learned for a shorter
# time, as the other one leaves it nothing to gain.
# Ends with exit code 1 if a stage has not learned what it should.
# usage: bash scripts/demo.sh [DIRECTORY]     (default runs/demo, which is made anew)
set -euo pipefail
out=${1:-}
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
start=$SECONDS

python scripts/make_demo.py --output="$out/data"
train() { # STAGE NAME START RECORDS [FLAGS]: one training run
  local stage=$1 name=$2 from=$3 records=$4
  shift 4
  python "scripts/train_$stage.py" --config="configs/$stage.py:demo" --workdir="$out/$name" \
    --config.model.init_from="$from" --config.data.images="$out/data/images" \
    --config.data.train="$out/data/${records}train.json" \
    --config.data.eval="$out/data/${records}eval.json" "$@"
}
answer() { # POLICY NAME RECORDS [FLAGS]: what a policy says to the last questions of records
  local policy=$1 name=$2 records=$3
  shift 3
  python scripts/predict.py --config=configs/predict.py --workdir="$out/$name" \
    --config.model.init_from="$out/$policy" --config.model.dtype=float32 \
    --config.data.eval="$records" --config.data.images="$out/data/images" \
    --config.generation.max_new_tokens=16 "$@"
}
questions=$out/data/preferences_eval.json
train sft sft "$out/data/model" ""
# Without seeing there is nothing to learn after one epoch.
train sft sft_blind "$out/data/model" "" --config.data.blank_images=true --config.num_train_epochs=3
train sft sft_short "$out/data/model" "" --config.num_train_epochs=3
train reward reward "$out/sft" preferences_
train dpo dpo "$out/sft" preferences_
train ppo ppo "$out/sft_short" preferences_ --config.ppo.reward_model="$out/reward"
for policy in sft dpo sft_short ppo; do
  answer $policy answers_$policy "$questions" --config.reward_model="$out/reward"
done
for pair in dpo:sft ppo:sft_short; do
  python scripts/demo_divergence.py --policy="$out/${pair%:*}" --start="$out/${pair#*:}" \
    --data="$out/data" --output="$out/divergence_${pair%:*}"
done
python scripts/export_hf.py --checkpoint="$out/ppo" --output="$out/export"
python scripts/demo_result.py "$out"
echo "exported to $out/export after $((SECONDS - start)) s in all"
