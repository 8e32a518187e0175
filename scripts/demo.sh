#!/usr/bin/env bash
# The main job on a set that is drawn here: from a tiny LLaVA checkpoint with random weights to one
# that answers questions about pictures, and the same with the pictures blanked for comparison.
# Ends with exit code 1 if the model has not learnt to see.
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
start=$SECONDS

python scripts/make_demo.py --output="$out/data"
sft() { # NAME [FLAGS]: one training run
  local name=$1
  shift
  python scripts/train_sft.py --config=configs/sft.py:demo --workdir="$out/$name" \
    --config.model.init_from="$out/data/model" --config.data.train="$out/data/train.json" \
    --config.data.eval="$out/data/eval.json" --config.data.images="$out/data/images" "$@"
}
sft sft
sft sft_blind --config.data.blank_images=true
python scripts/export_hf.py --checkpoint="$out/sft" --output="$out/export"
python scripts/demo_result.py "$out"
echo "exported to $out/export after $((SECONDS - start)) s in all"
