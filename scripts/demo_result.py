"""Shows what the demo's runs have learned, and judges it.

  python scripts/demo_result.py DIRECTORY [STAGE]

STAGE is one of `sft`, `answers`, `sft_blind`, `reward`, `dpo`, `ppo` and `policies` (a table of the
answers of all policies); without it, all stages of `scripts/demo.sh --all` are shown. Ends with
exit code 1 if a run is worse than one that learns what it should.
"""

import json
import sys
from collections.abc import Iterator

LEAST_EXACT, LEAST_GAIN = 0.9, 0.4
LEAST_PAIRS = 0.9
# Of 900 answers, what may change by chance: about one standard error.
EXACT_NOISE = 0.02
LEAST_PPO_GAIN = 0.1  # of answers that are right word for word
LEAST_SCORE_GAIN = 0.5
SHOWN = 6  # answers


# Policy -> the one that it began as; None: it began with random weights.
POLICIES = {"sft": None, "dpo": "sft", "early": None, "ppo": "early"}


def checkpoint(directory: str, policy: str) -> str:
  """Returns where a policy is: a run, or the checkpoint of SFT that PPO began as."""
  if policy != "early":
    return f"{directory}/{policy}"
  with open(f"{directory}/ppo/config.json", encoding="utf-8") as file:
    return json.load(file)["model"]["init_from"]


def evaluations(run: str) -> list[dict[str, float]]:
  """Returns the metrics of each evaluation of a run, without their `eval/`."""
  with open(f"{run}/metrics.jsonl", encoding="utf-8") as file:
    lines = [json.loads(line) for line in file]
  found = (
    {key.removeprefix("eval/"): value for key, value in line.items() if "eval/" in key}
    for line in lines
  )
  return [metrics for metrics in found if metrics]


def read(path: str) -> dict[str, float]:
  """Returns the content of a JSON file."""
  with open(path, encoding="utf-8") as file:
    return json.load(file)


def sft(directory: str) -> Iterator[str]:
  """Prints what SFT has learned; this and the following yield what is wrong."""
  exact = evaluations(f"{directory}/sft")[-1]["exact_match"]
  print(f"{exact:.1%} of held-out conversations are answered word for word")
  if exact < LEAST_EXACT:
    yield f"{exact:.1%} with pictures; at least {LEAST_EXACT:.0%} is expected"


def sft_blind(directory: str) -> Iterator[str]:
  """Prints what SFT learns without seeing."""
  exact, blind = (
    evaluations(f"{directory}/{name}")[-1]["exact_match"] for name in ("sft", "sft_blind")
  )
  print(f"{blind:.1%} are answered word for word if all pictures are gray")
  if exact - blind < LEAST_GAIN:
    yield (
      f"only {100 * (exact - blind):.1f} points better than with blanked pictures; at least"
      f" {100 * LEAST_GAIN:.0f} are expected"
    )


def reward(directory: str) -> Iterator[str]:
  """Prints what the reward model has learned."""
  accuracy = evaluations(f"{directory}/reward")[-1]["accuracy"]
  print(f"{accuracy:.1%} of held-out pairs of answers are ranked right")
  if accuracy < LEAST_PAIRS:
    yield f"the reward model ranks {accuracy:.1%} right; {LEAST_PAIRS:.0%} are expected"


def dpo(directory: str) -> Iterator[str]:
  """Prints what DPO has learned."""
  found = evaluations(f"{directory}/dpo")[-1]
  before, after = found["logps/reference_accuracies"], found["logps/accuracies"]
  margin = found["rewards/margins"]
  print(
    f"the better answer of a held-out pair is the likelier one in {after:.1%}, {before:.1%} before;"
    f" rewards/margins {margin:.3f}"
  )
  if after <= before or margin <= 0:
    yield "DPO does not prefer right answers more than SFT did"


def ppo(directory: str) -> Iterator[str]:
  """Prints how PPO's own evaluations have changed."""
  before, *_, after = evaluations(f"{directory}/ppo")
  print(
    f"sampled answers score {after['objective/scores']:.2f}, {before['objective/scores']:.2f}"
    f" before; KL to the start {after['objective/kl']:.2f}"
  )
  if after["objective/scores"] <= before["objective/scores"]:
    yield "PPO does not raise the score"


def answers(directory: str) -> Iterator[str]:
  """Prints some answers to held-out questions, and how many are right."""
  with open(f"{directory}/answers/predictions.jsonl", encoding="utf-8") as file:
    lines = [json.loads(line) for line in file]
  step = len(lines) // SHOWN + 1  # no multiple of the questions to a picture
  for line in lines[::step]:
    question = line["prompt"].rpartition("<image>\n")[2]
    says = "right" if line["answer"] == line["reference"] else f"wrong: {line['reference']}"
    print(f"{line['images'][0]}  {question:32}{line['answer']:28}{says}")
  exact = read(f"{directory}/answers/metrics.json")["exact_match"]
  print(f"{exact:.1%} of {len(lines)} answers are right word for word")
  if exact < LEAST_EXACT:
    yield f"{exact:.1%} of the answers are right; at least {LEAST_EXACT:.0%} is expected"


def policies(directory: str) -> Iterator[str]:
  """Prints how well each policy answers, and how far it has gone from what it began as."""
  found = {name: read(f"{directory}/answers_{name}/metrics.json") for name in POLICIES}
  print(f"{'answers to held-out questions':32}{'word for word':>14}{'score':>8}{'KL':>8}")
  step = checkpoint(directory, "early").rpartition("/")[2]
  labels = {"sft": "SFT", "dpo": "  DPO", "early": f"SFT, step {step}", "ppo": "  PPO (GRPO)"}
  for name, start in POLICIES.items():
    kl = f"{read(f'{directory}/divergence_{name}/divergence.json')['kl']:8.2f}" if start else ""
    metrics = found[name]
    print(f"{labels[name]:32}{metrics['exact_match']:14.1%}{metrics['reward']:8.2f}{kl}")

  after, before = found["dpo"]["exact_match"], found["sft"]["exact_match"]
  if after < before - EXACT_NOISE:
    yield (
      f"DPO answers {after:.1%} word for word, and what it began as {before:.1%}: it has lost what"
      " SFT learned"
    )
  gains = {key: found["ppo"][key] - found["early"][key] for key in ("exact_match", "reward")}
  if gains["exact_match"] < LEAST_PPO_GAIN:
    yield (
      f"PPO gains {100 * gains['exact_match']:.1f} points of right answers; at least"
      f" {100 * LEAST_PPO_GAIN:.0f} are expected"
    )
  if gains["reward"] < LEAST_SCORE_GAIN:
    yield f"PPO raises the score by {gains['reward']:.2f}; at least {LEAST_SCORE_GAIN} is expected"


STAGES = {judge.__name__: judge for judge in (sft, answers, sft_blind, reward, dpo, ppo, policies)}


def main(directory: str, *names: str) -> int:
  found = []
  for name in names or [name for name in STAGES if name != "answers"]:
    found += STAGES[name](directory)
  for fault in found:
    print(f"error: {fault}", file=sys.stderr)
  return 1 if found else 0


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
