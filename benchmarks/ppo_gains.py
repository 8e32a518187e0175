"""What PPO, RLOO and GRPO gain on the demo over seeds; with scorers that do not look it is less.

JAX_PLATFORMS=cpu python -m benchmarks.ppo_gains --demo=runs/demo --output=DIR [--seeds=3]

Trains the demo's preset as scripts/demo.sh --all does, from an early checkpoint of SFT and with the
demo's reward model, for each seed with each estimator, and with reward model and critic that see
gray pictures. Before and after, answers are sampled from the policies at temperature 1, and the
seeing reward model scores them. Prints the mean gains of score and exact match, the standard errors
over seeds of the first and the KL divergence, and fails if an estimator's gain is not above three
standard errors, or blind scorers gain as much. What is there already in the output directory is not
made again.
"""

import json
import os
import subprocess
import sys

import numpy as np
from absl import app, flags

DEMO = flags.DEFINE_string("demo", "runs/demo", "A directory of scripts/demo.sh --all.")
OUTPUT = flags.DEFINE_string("output", None, "Where runs and predictions go.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each kind.", lower_bound=2)

CRITIC = {
  "estimator": "gae",
  "loss_level": "token",
  "kl_coef": 0.05,
  "critic_learning_rate": 3e-4,
  "critic_warmup": 4,
  "cliprange_value": 0.0,
}
# Keys of the group `ppo` that differ from the preset, which is GRPO's.
VARIANTS = {
  "GRPO": {},
  "RLOO": {"estimator": "rloo", "loss_level": "sequence", "kl_coef": 0.05},
  "PPO": CRITIC,
  "GRPO, blind scorers": {"blank_images": True},
}
TIMES = 3.0  # standard errors


def run(script: str, *arguments: str) -> None:
  """Runs a script of the repository; fails if it does."""
  subprocess.run([sys.executable, f"scripts/{script}.py", *arguments], check=True)


def data(part: str) -> list[str]:
  """Flags that name the questions of a part, `train` or `eval`, and the pictures."""
  return [
    f"--config.data.{part}={DEMO.value}/data/preferences_{part}.json",
    f"--config.data.images={DEMO.value}/data/images",
  ]


def start() -> str:
  """Returns the checkpoint that the demo's PPO run started from."""
  with open(f"{DEMO.value}/ppo/config.json", encoding="utf-8") as file:
    return json.load(file)["model"]["init_from"]


def train(name: str, seed: int, settings: dict) -> str:
  """The run of a variant, trained now if it is not there."""
  directory = os.path.join(OUTPUT.value, f"{name}_{seed}".replace(", ", "_").replace(" ", "_"))
  run(
    "train_ppo",
    "--config=configs/ppo.py:demo",
    f"--workdir={directory}",
    f"--config.seed={seed}",
    f"--config.model.init_from={start()}",
    f"--config.ppo.reward_model={DEMO.value}/reward",
    *data("train"),
    *data("eval")[:1],
    *(f"--config.ppo.{key}={value}" for key, value in settings.items()),
  )
  return directory


def measure(policy: str, seed: int) -> tuple[float, float]:
  """The mean score and the exact match of one sampled answer to each held-out question."""
  directory = os.path.join(OUTPUT.value, f"answers_{os.path.basename(policy)}_by_{seed}")
  run(
    "predict",
    "--config=configs/predict.py",
    f"--workdir={directory}",
    f"--config.seed={seed}",
    f"--config.model.init_from={policy}",
    "--config.model.dtype=float32",
    f"--config.reward_model={DEMO.value}/reward",
    "--config.batch_size=60",
    "--config.gallery=0",
    "--config.generation.max_new_tokens=16",
    "--config.generation.temperature=1.0",
    *data("eval"),
  )
  with open(os.path.join(directory, "metrics.json"), encoding="utf-8") as file:
    found = json.load(file)
  return found["reward"], found["exact_match"]


def divergence(directory: str) -> float:
  """KL to the policy at the start, in nats per answer, as evaluated at a run's end."""
  with open(os.path.join(directory, "metrics.jsonl"), encoding="utf-8") as file:
    return json.loads(file.readlines()[-1])["eval/objective/kl"]


def main(_) -> None:
  before = np.array([measure(start(), seed) for seed in range(SEEDS.value)])
  gains, more_exact, kls = {}, {}, {}
  for name, settings in VARIANTS.items():
    runs = [train(name, seed, settings) for seed in range(SEEDS.value)]
    after = np.array([measure(directory, seed) for seed, directory in enumerate(runs)])
    gains[name], more_exact[name] = (after - before).T
    kls[name] = np.mean([divergence(directory) for directory in runs])

  score, exact = before.mean(axis=0)
  print(f"\n{SEEDS.value} seeds; before: score {score:.3f}, exact match {exact:.1%}")
  print(f"{'':22}{'gain':>8}{'error':>8}{'exact':>8}{'KL':>8}   gain of each seed")
  errors = {name: np.std(found, ddof=1) / SEEDS.value**0.5 for name, found in gains.items()}
  for name, found in gains.items():
    each = " ".join(f"{gain:.3f}" for gain in found)
    exact = f"{100 * np.mean(more_exact[name]):+8.1f}"
    print(f"{name:22}{np.mean(found):8.3f}{errors[name]:8.3f}{exact}{kls[name]:8.3f}   {each}")

  faults = []
  for name, found in gains.items():
    seeing, _, blind = name.partition(", ")
    if not blind and np.mean(found) <= TIMES * errors[name]:
      faults.append(f"{name} gains no more than {TIMES:g} standard errors")
    if blind:
      less, error = np.mean(gains[seeing]) - np.mean(found), np.hypot(errors[seeing], errors[name])
      if less <= TIMES * error:
        faults.append(f"{seeing} with blind scorers gains as much")
  for fault in faults:
    print(f"error: {fault}", file=sys.stderr)
  sys.exit(1 if faults else 0)


if __name__ == "__main__":
  app.run(main)
