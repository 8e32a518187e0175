"""Bytes that each device really holds at each ZeRO stage, as a table.

  python benchmarks/zero_memory.py

Eight virtual CPU devices, a LLaVA of 103M parameters in float32, the vision tower frozen. What a
device holds is read from its shards after a training step; the gradients' bytes are those of the
shards that the step sums them into. Ends with exit code 1 if a stage holds more than it promises:
its share, plus 5 %, plus what is too small to split.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from vlalign_jax import trees
from vlalign_jax.models import clip, llama, projector, rope, vlm
from vlalign_jax.optim import optimizer
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.sharding import rules, zero
from vlalign_jax.stages import defaults, sft
from vlalign_jax.steps import program as programs

DEVICES = 8
MODEL = vlm.ModelConfig(
  vision=clip.VisionConfig(384, 1536, 6, 6, 56, 14, "quick_gelu", 1e-5, (6,), False),
  projector=projector.ProjectorConfig("mlp", 384, 768),
  language=llama.LanguageConfig(32000, 768, 2048, 6, 12, 12, 64, 1e-5, rope.RopeConfig()),
  image_token_id=31999,
  image_mean=(0.5,) * 3,
  image_std=(0.25,) * 3,
)
# Stage -> (mesh, trees of which a device holds its share only).
STAGES = {
  "0": ({}, ()),
  "1": ({}, ("optimizer",)),
  "2": ({}, ("optimizer", "gradients")),
  "3": ({}, ("optimizer", "gradients", "trained", "frozen")),
  "3, tensor=2": ({"tensor": 2}, ("optimizer", "gradients", "trained", "frozen")),
}
COLUMNS = ("trained", "frozen", "optimizer", "gradients")


def bytes_of_first(tree) -> int:
  """Bytes that the first device holds."""
  return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def bytes_by_shape(tree) -> int:
  """Bytes a device of a tree of shapes with shardings."""
  return sum(
    int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def small(tree) -> int:
  """Bytes of a tree of shapes in parameters too small to split."""
  return sum(
    leaf.size * leaf.dtype.itemsize
    for path, leaf in trees.flatten(tree).items()
    if np.prod(leaf.shape["layers" in path.split("/") :]) < rules.MIN_SIZE
  )


def measure(stage: str, mesh_keys: dict) -> tuple[dict[str, int], dict[str, int]]:
  """(bytes of one device, bytes of what is too small to split) by column."""
  c = defaults("sft")
  c.mesh.update(data=1, fsdp=-1, zero_stage=int(stage[0]), **mesh_keys)
  c.model.update(dtype="float32", remat="none")
  mesh = meshes.make_mesh(c.mesh)
  program = sft.make_program(c, MODEL, mesh, 10)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, program.params)
  params = jax.jit(lambda key: vlm.init_params(MODEL, key)[1], out_shardings=shardings)(
    jax.random.key(0)
  )
  is_trained = functools.partial(optimizer.is_trained, config=c)
  trained, frozen = trees.split(params, is_trained)
  state = program.init_state(trained)
  shapes = programs.abstract_batch(MODEL, mesh, DEVICES, 64, 1)
  rows = {
    name: jax.device_put(jnp.ones(leaf.shape, leaf.dtype), leaf.sharding)
    for name, leaf in shapes.items()
  }
  state, metrics = program.train_step(state, frozen, rows)
  if not np.isfinite(float(metrics["loss"])):
    raise SystemExit(f"stage {stage}: the loss is {metrics['loss']}")
  gradients = meshes.place(
    program.state.params,
    zero.shardings(mesh, program.state.params, split=c.mesh.zero_stage >= 2),
  )
  held = {
    "trained": bytes_of_first(state.params),
    "frozen": bytes_of_first(frozen),
    "optimizer": bytes_of_first(state.optimizer),
    "gradients": bytes_by_shape(gradients),
  }
  whole_trained, whole_frozen = small(program.state.params), small(program.frozen)
  return held, {
    "trained": whole_trained,
    "frozen": whole_frozen,
    "optimizer": 2 * whole_trained + 64,
    "gradients": whole_trained,
  }


def main() -> None:
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", DEVICES)
  whole, broken = {}, []
  print(f"| ZeRO stage | {' | '.join(COLUMNS)} | all |")
  print(f"|---|{'---|' * (len(COLUMNS) + 1)}")
  for stage, (mesh_keys, split) in STAGES.items():
    held, unsplit = measure(stage, mesh_keys)
    whole = whole or held
    cells = [f"{held[name] / 1e6:.1f}" for name in COLUMNS]
    print(f"| {stage} | {' | '.join(cells)} | {sum(held.values()) / 1e6:.1f} MB |")
    for name in COLUMNS:
      promised = whole[name] * 1.05 / DEVICES + unsplit[name] if name in split else whole[name]
      if held[name] > promised:
        broken.append(f"stage {stage}: {name} takes {held[name]} bytes, {promised:.0f} promised")
  if broken:
    sys.exit("\n".join(broken))


if __name__ == "__main__":
  main()
