"""Shows what the demo's runs have learnt, and judges it.

  python scripts/demo_result.py DIRECTORY

Ends with exit code 1 if a run is worse than one that learns what it should.
"""

import json
import sys
from collections.abc import Iterator

LEAST_EXACT, LEAST_GAIN = 0.9, 0.4
LEAST_PAIRS = 0.9
# Of 300 answers, what may change by chance: about one standard error.
EXACT_NOISE = 0.02


def last_evaluation(run: str) -> dict[str, float]:
  """The metrics at the end of a run, without their `eval/`."""
  with open(f"{run}/metrics.jsonl", encoding="utf-8") as file:
    last = json.loads(file.readlines()[-1])
  return {key.removeprefix("eval/"): value for key, value in last.items() if "eval/" in key}


def exact_answers(directory: str) -> float:
  """The share of held-out questions answered word for word."""
  with open(f"{directory}/metrics.json", encoding="utf-8") as file:
    return json.load(file)["exact_match"]


def faults(directory: str) -> Iterator[str]:
  """Prints the table; yields what is wrong with it."""
  names = ("sft", "sft_blind", "reward", "dpo")
  sft, blind, reward, dpo = (last_evaluation(f"{directory}/{name}") for name in names)
  before, after = (exact_answers(f"{directory}/answers_{name}") for name in ("sft", "dpo"))
  preferred = dpo["logps/reference_accuracies"], dpo["logps/accuracies"]

  print(f"\n{'held out':50}{'share':>8}")
  for label, share in (
    ("whole conversations word for word, with pictures", sft["exact_match"]),
    ("  with blanked pictures", blind["exact_match"]),
    ("pairs that the reward model ranks right", reward["accuracy"]),
    ("pairs whose right answer is likelier, SFT", preferred[0]),
    ("  DPO", preferred[1]),
    ("last answers word for word, SFT", before),
    ("  DPO", after),
  ):
    print(f"{label:50}{share:8.1%}")
  print(f"{'DPO, rewards/margins':50}{dpo['rewards/margins']:8.3f}")

  if sft["exact_match"] < LEAST_EXACT:
    yield f"{sft['exact_match']:.1%} with pictures; at least {LEAST_EXACT:.0%} is expected"
  if sft["exact_match"] - blind["exact_match"] < LEAST_GAIN:
    gain = 100 * (sft["exact_match"] - blind["exact_match"])
    yield (
      f"only {gain:.1f} points better than with blanked pictures; at least"
      f" {100 * LEAST_GAIN:.0f} are expected"
    )
  if reward["accuracy"] < LEAST_PAIRS:
    yield f"the reward model ranks {reward['accuracy']:.1%} right; {LEAST_PAIRS:.0%} are expected"
  if preferred[1] <= preferred[0] or dpo["rewards/margins"] <= 0:
    yield "DPO does not prefer right answers more than SFT did"
  if after < before - EXACT_NOISE:
    yield f"DPO answers {after:.1%} word for word, SFT {before:.1%}: it has lost what SFT learnt"


def main(directory: str) -> int:
  found = list(faults(directory))
  for fault in found:
    print(f"error: {fault}", file=sys.stderr)
  return 1 if found else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1]))
