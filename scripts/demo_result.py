"""Shows what the demo's runs have learned, and judges it.

  python scripts/demo_result.py DIRECTORY

Ends with exit code 1 if a run is worse than one that learns what it should.
"""

import json
import sys
from collections.abc import Iterator

LEAST_EXACT, LEAST_GAIN = 0.9, 0.4
LEAST_PAIRS = 0.9
# Of 900 answers, what may change by chance: about one standard error.
EXACT_NOISE = 0.02
LEAST_SCORE_GAIN = 0.2  # of PPO; a right answer scores some 7 more than a wrong one
# Policy -> the one that it began as; None: it began with random weights.
POLICIES = {"sft": None, "dpo": "sft", "sft_short": None, "ppo": "sft_short"}
LABELS = {"sft": "SFT", "dpo": "  DPO", "sft_short": "SFT, 3 epochs", "ppo": "  PPO"}


def last_evaluation(run: str) -> dict[str, float]:
  """The metrics at the end of a run, without their `eval/`."""
  with open(f"{run}/metrics.jsonl", encoding="utf-8") as file:
    last = json.loads(file.readlines()[-1])
  return {key.removeprefix("eval/"): value for key, value in last.items() if "eval/" in key}


def read(path: str) -> dict[str, float]:
  """The content of a JSON file."""
  with open(path, encoding="utf-8") as file:
    return json.load(file)


def faults(directory: str) -> Iterator[str]:
  """Prints the table; yields what is wrong with it."""
  sft, blind, reward, dpo = (
    last_evaluation(f"{directory}/{name}") for name in ("sft", "sft_blind", "reward", "dpo")
  )
  preferred = dpo["logps/reference_accuracies"], dpo["logps/accuracies"]
  print(f"\n{'held out':50}{'share':>8}")
  for label, share in (
    ("whole conversations word for word, with pictures", sft["exact_match"]),
    ("  with blanked pictures, 3 epochs", blind["exact_match"]),
    ("pairs that the reward model ranks right", reward["accuracy"]),
    ("pairs whose right answer is likelier, SFT", preferred[0]),
    ("  DPO", preferred[1]),
  ):
    print(f"{label:50}{share:8.1%}")
  print(f"{'DPO, rewards/margins':50}{dpo['rewards/margins']:8.3f}")

  answers = {name: read(f"{directory}/answers_{name}/metrics.json") for name in POLICIES}
  print(f"\n{'answers to held-out questions':32}{'word for word':>14}{'score':>8}{'KL':>8}")
  for name, start in POLICIES.items():
    kl = f"{read(f'{directory}/divergence_{name}/divergence.json')['kl']:8.2f}" if start else ""
    found = answers[name]
    print(f"{LABELS[name]:32}{found['exact_match']:14.1%}{found['reward']:8.2f}{kl}")

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
  for name, start in POLICIES.items():
    before, after = (answers[one]["exact_match"] for one in (start or name, name))
    if after < before - EXACT_NOISE:
      yield (
        f"{name.upper()} answers {after:.1%} word for word, and what it began as {before:.1%}: it"
        " has lost what SFT learned"
      )
  gain = answers["ppo"]["reward"] - answers["sft_short"]["reward"]
  if gain < LEAST_SCORE_GAIN:
    yield f"PPO raises the score by {gain:.2f}; at least {LEAST_SCORE_GAIN} is expected"


def main(directory: str) -> int:
  found = list(faults(directory))
  for fault in found:
    print(f"error: {fault}", file=sys.stderr)
  return 1 if found else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1]))
