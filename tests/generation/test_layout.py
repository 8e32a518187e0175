"""The mesh of the sampler: what is refused, and what `auto` chooses for a model and devices."""

import dataclasses
import math

import pytest

from configs import ppo as presets
from tests.planning import small
from vlalign_jax.errors import InputError
from vlalign_jax.generation import layout
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.models.vlm import abstract_params
from vlalign_jax.planning import topology, train_step
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.sharding import zero

KEY = "ppo.sampling_mesh"


@pytest.mark.parametrize("value", ["tensor", "fsdp=2", "tensor=0", "tensor=2,tensor=4", "data=-1"])
def test_sizes_that_make_no_sense_are_refused(value):
  with pytest.raises(InputError, match=f"config.ppo.sampling_mesh is '{value}'; give \"auto\""):
    layout.sizes(value, KEY)


def test_an_axis_that_is_not_named_takes_the_other_devices():
  mesh = _mesh("v5e:2x4", fsdp=8)
  model = small.model()  # 8 heads, 4 of keys and values
  for value, expected in (("tensor=4", (2, 1, 4)), ("data=4", (4, 1, 2)), ("data=8", (8, 1, 1))):
    made = layout.make_mesh(mesh, layout.sizes(value, KEY), model, KEY)
    assert made.devices.shape == expected
    assert list(made.devices.flat) == list(mesh.devices.flat)
  for value in ("tensor=8", "tensor=3", "data=2,tensor=2"):
    with pytest.raises(InputError, match="there are 8 devices.*choose it from 1, 2, 4"):
      layout.make_mesh(mesh, layout.sizes(value, KEY), model, KEY)


def _mesh(devices: str, **sizes):
  axes = {"data": 1, "fsdp": 1, "tensor": 1} | sizes
  return meshes.make_mesh(axes, topology.open_topology(devices).devices)


def _choose(mesh, kv_heads=None, held=0.0, rows=16, split=True):
  c = presets.get_config("llava15_7b_lora")
  model = train_step.model_config(c, "language")
  if kv_heads:
    language = dataclasses.replace(model.language, kv_heads=kv_heads)
    model = dataclasses.replace(model, language=language)
  shapes = abstract_params(model, param_dtype="bfloat16")[1]
  shapes = meshes.place(shapes, zero.shardings(mesh, shapes, split=split))
  demand = layout.Demand(model, Sampling(384), rows, 2048, "bfloat16")
  return layout.choose(mesh, shapes, demand, held)


def test_auto_splits_a_large_model_over_its_heads():
  mesh = _mesh("v5e:2x4", fsdp=8)
  assert _choose(mesh).devices.shape == (1, 1, 8)
  # As far as there are heads of keys and values; the groups have copies.
  assert _choose(mesh, kv_heads=2).devices.shape == (4, 1, 2)


def test_auto_leaves_weights_where_they_are_if_nothing_else_fits():
  mesh = _mesh("v5e:2x4", fsdp=8)
  assert _choose(mesh, held=15.0 * 2**30) is None


def test_what_is_in_its_place_is_not_moved():
  mesh = _mesh("v5e:2x4", fsdp=1, tensor=8)
  shapes = abstract_params(small.model(), param_dtype="bfloat16")[1]
  shapes = meshes.place(shapes, zero.shardings(mesh, shapes, split=False))
  assert layout.placement(mesh, shapes, "bfloat16") == {}
  wanted = layout.placement(mesh, shapes, "float32")
  matrices = {path for path in wanted if path.endswith(("/kernel", "/embedding"))}
  assert matrices == set(wanted)
  sizes = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in wanted.values()]
  assert all(size > 0 for size in sizes)
