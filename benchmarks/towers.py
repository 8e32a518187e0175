"""From two bare towers through every stage, as one script: tiny random models, a few steps each.

JAX_PLATFORMS=cpu python -m benchmarks.towers [--projector=perceiver] [--mmca] [--lora]

A CLIP and a LLaMA are joined by a fresh projector. Then come pretraining (projector and
embeddings), SFT, reward model, DPO, PPO, prediction, export, and a run that starts from the export.
Fails if a stage fails, a loss is not finite, what should stay has moved, or a weight has not come
back from the export bit for bit.
"""

import math
import os
import subprocess
import sys
import tempfile

import jax
import numpy as np
from absl import app, flags

from tests import parity, sft_run, tiny_models
from vlalign_jax import trees
from vlalign_jax.models.projector import PROJECTORS
from vlalign_jax.weights import source

PROJECTOR = flags.DEFINE_enum("projector", "linear", PROJECTORS, "Of the joined model.")
MMCA = flags.DEFINE_bool("mmca", False, "With multi-modal causal attention.")
LORA = flags.DEFINE_bool("lora", False, "SFT, reward model, DPO and PPO with adapters.")

RECORDS, STEPS = 24, 3
# Perceivers have heads of 128.
LANGUAGE_WIDTH = 128


def run(script: str, *arguments: str) -> None:
  """Runs a script of the repository; fails if it does."""
  subprocess.run([sys.executable, f"scripts/{script}.py", *arguments], check=True)


def train(stage: str, directory: str, name: str, *settings: str) -> str:
  """Trains for a few steps; the run directory."""
  kind = {"sft": "sft", "ppo": "sft"}.get(stage, "ranked")
  out = f"{directory}/{name}"
  run(
    f"train_{stage}",
    f"--config=configs/{stage}.py:demo",
    f"--workdir={out}",
    f"--config.data.train={directory}/{kind}.json",
    f"--config.data.eval={directory}/{kind}_eval.json",
    f"--config.max_steps={STEPS}",
    "--config.batch_size=8",
    "--config.log_every=1",
    # Room for the perceiver's 256 tokens of each of two pictures.
    "--config.data.max_length=768",
    "--config.train.vision=false",
    *settings,
  )
  lines = [line for line in sft_run.read_metrics(out) if "loss" in line]
  assert len(lines) == STEPS, f"{name} has logged {len(lines)} steps"
  assert all(math.isfinite(line["loss"]) for line in lines), f"a loss of {name} is not finite"
  return out


def weights(place: str = "", **towers: str) -> dict[str, np.ndarray]:
  """All parameters of a model directory, of a run with its adapters merged, or of two towers."""
  opened = source.open_source(parity.model_group(init_from=place, **towers))
  _, params = parity.load_all(opened)
  return trees.flatten(jax.device_get(params))


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], part: str = "") -> bool:
  """Whether all parameters below a path have the same bits."""
  paths = [path for path in expected if path.startswith(part)]
  assert paths, f"no parameter below {part}"
  return all(path in found and np.array_equal(found[path], expected[path]) for path in paths)


def check(what: str, holds: bool) -> None:
  """Prints what holds; fails if it does not."""
  if not holds:
    sys.exit(f"error: not so: {what}")
  print(what)


def export(run_directory: str) -> str:
  """The directory that a run is exported to, as which it must come back."""
  out = f"{run_directory}_export"
  run("export_hf", f"--checkpoint={run_directory}", f"--output={out}")
  name = os.path.basename(run_directory)
  found, expected = weights(out), weights(run_directory)
  check(
    f"{name}: all {len(expected)} tensors of the export have the same bits",
    found.keys() == expected.keys() and same(found, expected),
  )
  return out


def main(_) -> None:
  with tempfile.TemporaryDirectory() as directory:
    tiny_models.make_clip(f"{directory}/clip", whole=True)
    tiny_models.make_llama(f"{directory}/llama", hidden_size=LANGUAGE_WIDTH)
    records = sft_run.make_records(directory, RECORDS)
    for name, found in (("sft", records), ("ranked", sft_run.ranked(records))):
      sft_run.write_json(f"{directory}/{name}.json", found[:-4])
      sft_run.write_json(f"{directory}/{name}_eval.json", found[-4:])
    parts = {
      "vision": f"{directory}/clip",
      "language": f"{directory}/llama",
      "projector": PROJECTOR.value,
    }
    towers = (
      *(f"--config.model.{key}={value}" for key, value in parts.items()),
      f"--config.model.mmca={str(MMCA.value).lower()}",
    )
    adapters = ("--config.lora.rank=4", "--config.lora.alpha=8") if LORA.value else ()

    only = ("--config.train.language=false", "--config.train.embeddings=true")
    pretrained = train("sft", directory, "pretrain", *towers, *only)
    sft = train("sft", directory, "sft", f"--config.model.init_from={pretrained}", *adapters)
    start = (f"--config.model.init_from={sft}", *adapters)
    reward = train("reward", directory, "reward", *start)
    dpo = train("dpo", directory, "dpo", *start)
    ppo = train(
      "ppo",
      directory,
      "ppo",
      f"--config.model.init_from={dpo}",
      f"--config.ppo.reward_model={reward}",
      "--config.ppo.num_generations=2",
      "--config.ppo.num_mini_batches=2",
      "--config.ppo.critic_warmup=0",
      "--config.ppo.max_new_tokens=6",
      *adapters,
    )
    bare, before, after = weights(**parts), weights(pretrained), weights(sft)
    for part in ("vision/", "language/layers/", "language/norm/", "language/head/"):
      check(f"pretraining leaves {part} as it was", same(before, bare, part))
    for part in ("projector/", "language/embedding/"):
      check(f"pretraining moves {part}", not same(before, bare, part))
    check("pretraining and SFT leave the vision tower", same(after, before, "vision/"))
    check("SFT moves the language model", not same(after, before, "language/layers/"))

    answers = f"{directory}/answers"
    run(
      "predict",
      "--config=configs/predict.py",
      f"--workdir={answers}",
      f"--config.model.init_from={ppo}",
      "--config.generation.max_new_tokens=6",
      f"--config.data.eval={directory}/sft_eval.json",
    )
    with open(f"{answers}/predictions.jsonl", encoding="utf-8") as file:
      check("every question has an answer", len(file.readlines()) == 4)
    for run_directory in (sft, reward, dpo):
      export(run_directory)
    train("sft", directory, "again", f"--config.model.init_from={export(ppo)}")
    print("the export trains on")


if __name__ == "__main__":
  app.run(main)
