"""Compares the demo's two runs: with pictures and with blanked ones.

  python scripts/demo_result.py DIRECTORY

Prints held-out exact match of DIRECTORY/sft and DIRECTORY/sft_blind; ends with exit code 1 if it is
lower than a model that learns to see reaches.
"""

import json
import sys

LEAST, LEAST_GAIN = 0.9, 0.4


def exact_match(run: str) -> tuple[float, int]:
  """(share of examples answered word for word, their number) at the end of a run."""
  with open(f"{run}/metrics.jsonl", encoding="utf-8") as file:
    last = json.loads(file.readlines()[-1])
  return last["eval/exact_match"], int(last["eval/examples"])


def main(directory: str) -> int:
  print(f"\n{'held-out exact match':24}{'share':>8}")
  shares = []
  for name, label in (("sft", "with pictures"), ("sft_blind", "with blanked pictures")):
    share, examples = exact_match(f"{directory}/{name}")
    print(f"{label:24}{share:8.1%}   of {examples} examples")
    shares.append(share)
  seeing, blind = shares
  if seeing < LEAST:
    print(f"error: {seeing:.1%} with pictures; at least {LEAST:.0%} is expected", file=sys.stderr)
    return 1
  if seeing - blind < LEAST_GAIN:
    print(
      f"error: only {100 * (seeing - blind):.1f} points better than with blanked pictures; at least"
      f" {100 * LEAST_GAIN:.0f} are expected",
      file=sys.stderr,
    )
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1]))
