"""Samples a rollout on eight CPU devices in many ways; test_meshes runs it as a process.

python -m tests.rollout.sampled_on_meshes DIRECTORY

Writes one JSON object: name -> the answers in the order of their records, and the layout of the
sampler.
"""

import json
import sys

import jax
import numpy as np

from tests import sft_run
from tests.rollout import tiny_ppo
from vlalign_jax import trees
from vlalign_jax.input_pipeline import prompts
from vlalign_jax.rollout import learn
from vlalign_jax.sharding import hosts, rules

PROMPTS, SAMPLES = 16, 3
ONE, ONE_LORA = "one device", "one device, LoRA"
LORA = {"lora.rank": 2, "train.vision": False, "train.projector": False}
HEADS, ROWS = {"ppo.sampling_mesh": "tensor=2"}, {"ppo.sampling_mesh": "data=8"}
# Name -> overrides of the config. The model has 4 heads, and 2 of keys and values.
RUNS = {
  ONE: {"mesh.data": 1},
  "one device, slots": {"mesh.data": 1, "ppo.slots": 5},
  "ZeRO 0, auto": {"mesh.data": 8},
  "ZeRO 0, auto, slots": {"mesh.data": 8, "ppo.slots": 8},
  "ZeRO 1, heads": {"mesh.fsdp": 8, "mesh.zero_stage": 1} | HEADS,
  "ZeRO 1, heads, slots": {"mesh.fsdp": 8, "mesh.zero_stage": 1, "ppo.slots": 12} | HEADS,
  "ZeRO 2, rows, slots": {"mesh.fsdp": 8, "mesh.zero_stage": 2, "ppo.slots": 8} | ROWS,
  "ZeRO 3, in place, slots": {
    "mesh.fsdp": 8,
    "mesh.zero_stage": 3,
    "ppo.sampling_mesh": "",
    "ppo.slots": 8,
  },
  "ZeRO 3, tensor, slots": {
    "mesh.fsdp": 4,
    "mesh.tensor": 2,
    "mesh.zero_stage": 3,
    "ppo.sampling_mesh": "",
    "ppo.slots": 4,
  },
  ONE_LORA: {"mesh.data": 1} | LORA,
  "ZeRO 3, heads, slots, LoRA": {"mesh.fsdp": 8, "mesh.zero_stage": 3, "ppo.slots": 4}
  | HEADS
  | LORA,
}


def sample(files: tiny_ppo.Files, name: str, workdir: str) -> dict:
  """Returns the answers of a run's first rollout."""
  settings = {
    "batch_size": PROMPTS,
    "max_steps": 1,
    "ppo.max_new_tokens": 12,
    "ppo.num_generations": SAMPLES,
    "ppo.estimator": "rloo",
    "ppo.reward_model": "",
    "ppo.reward_function": "tests.rollout.scorers:length",
  }
  config = files.config(**settings | RUNS[name])
  devices = jax.devices()[:1] if name.startswith(ONE) else jax.devices()
  run = tiny_ppo.make_run(files, config, f"{workdir}/{name}", devices=devices)
  with run.train.batches() as batches:
    rows = next(batches)
  del rows["skipped"]
  order, streams = learn.by_record(prompts.record_numbers(run.train.plan, 0))
  rows = hosts.to_device(run.held.mesh, rows)
  streams = hosts.whole_to_device(run.held.mesh, {"streams": streams})["streams"]
  params = trees.map_paths(moved_away, trees.merge(run.state.params, run.held.frozen))
  sampler = run.held.sampler
  generated = jax.device_get(sampler.sample(sampler.place(params), rows, streams, 7))
  answers = {field: array[order].tolist() for field, array in generated._asdict().items()}
  return answers | {
    "mesh": dict(sampler.mesh.shape),
    "moved": len(sampler.moved),
    "slot_lengths": sampler.slot_lengths,
  }


def moved_away(path: str, leaf: jax.Array) -> jax.Array:
  """Gives adapters, which begin as nothing, a part in the answers."""
  if not path.endswith("lora_b"):
    return leaf
  noise = 0.2 * np.random.default_rng(len(path)).normal(size=leaf.shape)
  return jax.device_put(noise.astype(leaf.dtype), leaf.sharding)


def lengthen(path: str) -> None:
  """Makes three of four prompts longer, so that slots differ in length."""
  with open(path, encoding="utf-8") as file:
    records = json.load(file)
  for number, record in enumerate(records):
    record["conversations"][0]["value"] += " Why?" * (number % 4) * 8
  sft_run.write_json(path, records)


def main(directory: str) -> None:
  rules.MIN_SIZE = 32  # all arrays of a tiny model are below the real limit
  files = tiny_ppo.make(f"{directory}/files")
  lengthen(f"{directory}/files/train.json")
  print(json.dumps({name: sample(files, name, f"{directory}/runs") for name in RUNS}))


if __name__ == "__main__":
  main(sys.argv[1])
