"""ZeRO in programs that are compiled for TPUs, without a TPU."""

import functools
import re

import jax
import pytest

from vlalign_jax.models import clip, llama, projector, rope, vlm
from vlalign_jax.planning import topology
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.stages import defaults, sft
from vlalign_jax.steps import program as programs

pytestmark = pytest.mark.slow

ROWS, LENGTH, WIDTH, MLP_WIDTH = 16, 512, 1024, 2816


def compiled(stage: int, layers: int, fsdp: int):
  """Returns (program, compiled train step) of a small LLaVA on sixteen chips."""
  c = defaults("sft")
  c.mesh.update(data=-1, fsdp=fsdp, zero_stage=stage)
  model = vlm.ModelConfig(
    clip.VisionConfig(128, 256, 1, 2, 28, 14, "quick_gelu", 1e-5, (1,), False),
    projector.ProjectorConfig("mlp", 128, WIDTH),
    llama.LanguageConfig(2048, WIDTH, MLP_WIDTH, layers, 8, 8, 128, 1e-5, rope.RopeConfig()),
    image_token_id=2047,
    image_mean=(0.5,) * 3,
    image_std=(0.25,) * 3,
  )
  mesh = meshes.make_mesh(c.mesh, topology.open_topology("v5e:4x4").devices)
  program = sft.make_program(c, model, mesh, 10)
  batch = programs.abstract_batch(model, mesh, ROWS, LENGTH, 1)
  step = program.train_step.lower(program.state, program.frozen, batch).compile()
  return program, step


def device_bytes(tree, itemsize: int | None = None) -> int:
  """Returns the bytes per device of a tree of shapes with shardings."""
  return sum(
    functools.reduce(int.__mul__, leaf.sharding.shard_shape(leaf.shape), 1)
    * (itemsize or leaf.dtype.itemsize)
    for leaf in jax.tree.leaves(tree)
  )


def test_stage_2_scatters_gradients():
  _, step = compiled(2, 2, 4)
  scatters = set(re.findall(r"calls=%(all-reduce-scatter[.\w]*)", step.as_text()))
  # Query, key, value, out, gate, up and down of the scanned layer.
  assert len(scatters) >= 7


def test_stage_3_gathers_one_layer_at_a_time():
  """With depth, only gradient shards and one saved activation per layer take more memory."""
  sizes = {}
  for layers in (2, 10):
    program, step = compiled(3, layers, 16)
    memory = step.memory_analysis()
    gradients = device_bytes(program.state.params, 4)
    saved = layers * ROWS // 16 * LENGTH * WIDTH * 2
    sizes[layers] = memory.peak_memory_in_bytes - memory.argument_size_in_bytes - gradients - saved
  gathered = (4 * WIDTH**2 + 3 * WIDTH * MLP_WIDTH) * 2  # a layer's parameters in bfloat16
  assert sizes[2] > gathered
  assert sizes[10] - sizes[2] < 0.1 * 8 * gathered
