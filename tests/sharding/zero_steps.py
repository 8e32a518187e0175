"""Train steps at every ZeRO stage on eight CPU devices, run as a process of its own by test_zero.

python -m tests.sharding.zero_steps MODEL_DIRECTORY [RUN ...]

Writes one JSON object: run -> losses, gradient norms, and the share of bytes on one device.
"""

import dataclasses
import functools
import json
import re
import sys

import jax
import jax.numpy as jnp

from tests import parity
from vlalign_jax import trees
from vlalign_jax.models import lora
from vlalign_jax.optim import optimizer
from vlalign_jax.sharding import hosts, rules
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.stages import defaults, sft
from vlalign_jax.weights import load, source

STEPS, ROWS, LENGTH = 10, 16, 52
# Name -> (data, fsdp, tensor, ZeRO stage, micro-batches, whether the language model is trained,
# whether the optimizer's state is kept by the host, the rank of adapters).
RUNS = {
  "one device": (1, 1, 1, 0, 1, True, False),
  "stage 0": (2, 4, 1, 0, 1, True, False),
  "stage 1": (2, 4, 1, 1, 1, True, False),
  "stage 2": (2, 4, 1, 2, 2, True, False),
  "stage 3": (2, 4, 1, 3, 2, True, True),
  "stage 3, tensor": (1, 4, 2, 3, 2, True, False),
  "stage 1, tensor": (2, 2, 2, 1, 1, True, False),
  "one device, frozen": (1, 1, 1, 0, 1, False, False),
  "stage 3, frozen": (2, 4, 1, 3, 2, False, False),
  "stage 3, tensor, frozen": (1, 4, 2, 3, 1, False, False),
  "one device, adapters": (1, 1, 1, 0, 1, True, False, 4),
  "stage 3, tensor, adapters": (1, 4, 2, 3, 1, True, False, 4),
}


def make_batch(config):
  """Makes rows of one example each, of several lengths, some without image; two are all padding."""
  pictures = parity.make_pictures(3, config.vision.image_size)
  layout = [
    [parity.make_example(config, 3 + 2 * r, (f"{r % 4}.png",) if r % 4 < 3 else (), r)]
    for r in range(ROWS - 2)
  ]
  return parity.make_rows(config, [*layout, [], []], pictures, LENGTH, 1)


def share_of_one_device(tree) -> float:
  """Returns the bytes on the first device over the bytes of the tree."""
  leaves = jax.tree.leaves(tree)
  here = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
  return here / sum(leaf.nbytes for leaf in leaves)


def moved(program: str) -> list[list[int]]:
  """Returns shapes of arrays that a compiled program gathers or sums over devices.

  The embedding's gradient is left out: once per micro-batch, moving its rows may be cheaper than
  moving the table.
  """
  shapes = []
  for line in program.splitlines():
    match = re.search(r"= (.*?) (all-gather|all-reduce|all-to-all)(-start)?\(", line)
    if match and "jit(_take)" not in line:
      listed = re.findall(r"\w\d+\[([\d,]*)\]", match.group(1))
      shapes += [[int(n) for n in shape.split(",") if n] for shape in listed]
  return shapes


def merged(program, trained, frozen, config) -> dict:
  """Merges the adapters of two kernels, which keep their shardings."""
  merged_kernels = {}
  for path in ("language/layers/attention/out", "vision/layers/mlp/up"):
    flat = trees.flatten(trees.merge(trained, frozen))
    kernel = jnp.copy(flat[f"{path}/kernel"])
    a, b = (flat[f"{path}/{name}"] for name in lora.NAMES)
    result = lora.merge(kernel, a, b, config.scale(a.shape[-1]), kernel.sharding)
    assert result.sharding == trees.flatten(program.params)[f"{path}/kernel"].sharding
    merged_kernels[path] = result
  return {"merged": merged_kernels}


def run(
  opened,
  data: int,
  fsdp: int,
  tensor: int,
  stage: int,
  accumulation: int,
  language: bool,
  offload: bool,
  rank: int = 0,
) -> dict:
  c = defaults("sft")
  c.mesh.update(data=data, fsdp=fsdp, tensor=tensor, zero_stage=stage, offload_optimizer=offload)
  c.train.language = language
  c.lora.update(rank=rank, vision_rank=rank, dropout=0.1)
  model = dataclasses.replace(opened.config, lora=lora.from_group(c.lora))
  opened = dataclasses.replace(opened, config=model)
  c.grad_accumulation = accumulation
  c.model.update(dtype="float32", remat="none")
  c.optim.update(learning_rate=3e-3, warmup_ratio=0.0, weight_decay=0.1)
  mesh = meshes.make_mesh(c.mesh, jax.devices()[: data * fsdp * tensor])
  program = sft.make_program(c, opened.config, mesh, STEPS)
  params = load.load_params(opened, program.params)
  trained, frozen = trees.split(params, functools.partial(optimizer.is_trained, config=c))
  state = program.init_state(trained)
  batch = hosts.to_device(mesh, make_batch(opened.config))
  step = program.train_step.lower(state, frozen, batch).compile()
  logged = []
  for _ in range(STEPS):
    state, metrics = step(state, frozen, batch)
    logged.append(jax.device_get(metrics))
  trained = state.params
  if rank:
    trained = trained | merged(program, trained, frozen, model.lora)
  trained = trees.flatten(jax.device_get(trained))
  return {
    "loss": [float(metrics["loss"]) for metrics in logged],
    "grad_norm": [float(metrics["grad_norm"]) for metrics in logged],
    "params": {path: leaf.tolist() for path, leaf in trained.items()},
    "moved": moved(step.as_text()),
    "memory": sorted(
      {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim}
    ),
    "share": {
      "trained": share_of_one_device(state.params),
      "frozen": share_of_one_device(frozen),
      "optimizer": share_of_one_device(state.optimizer),
    },
  }


def main(directory: str, *chosen: str) -> None:
  rules.MIN_SIZE = 32  # a tiny model has no parameter of the real size
  opened = source.open_source(parity.model_group(init_from=directory))
  runs = {name: run(opened, *options) for name, options in RUNS.items() if name in (chosen or RUNS)}
  print(json.dumps(runs | {"layers": opened.config.language.layers}))


if __name__ == "__main__":
  main(*sys.argv[1:])
