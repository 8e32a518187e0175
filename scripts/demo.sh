#!/usr/bin/env bash
# The main job on a set that is drawn here: from a tiny LLaVA checkpoint with random weights to one
# that answers questions about pictures, and the same with the pictures blanked for comparison.
# usage: bash scripts/demo.sh [DIRECTORY]     (default runs/demo)
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements.txt
export JAX_PLATFORMS=cpu
out=${1:-runs/demo}
rm -rf "$out"
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

python - "$out" "$((SECONDS - start))" <<'END'
import json
import sys

out, seconds = sys.argv[1:]
print(f"\n{'held-out exact match':24}{'share':>8}")
for name, label in (("sft", "with pictures"), ("sft_blind", "with blanked pictures")):
  with open(f"{out}/{name}/metrics.jsonl", encoding="utf-8") as file:
    last = json.loads(file.readlines()[-1])
  print(f"{label:24}{last['eval/exact_match']:8.1%}   of {last['eval/examples']:.0f} examples")
print(f"exported to {out}/export after {seconds} s in all")
END
