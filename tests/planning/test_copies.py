"""How many copies of a model's weights DPO holds: in a run, and as planned on many devices."""

import gc
import math

import jax
import pytest

from configs import dpo as presets
from scripts import train_dpo
from tests import sft_run, tiny_models
from vlalign_jax import trees
from vlalign_jax.models import lora
from vlalign_jax.planning import topology, train_step
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.steps import dpo

ADAPTERS = {"lora.rank": 2, "train.projector": False, "dpo.reference": "step"}
# Copies of the weights, as a share of what is trained of them.
RUNS = {
  "adapters": (ADAPTERS, 0),
  "kept reference": ({"dpo.reference": "cache"}, 0),
  "reference in the step": ({"dpo.reference": "step"}, 1),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory, compile_cache):
  directory = tmp_path_factory.mktemp("copies")
  tiny_models.make_llava(str(directory / "model"))
  records = sft_run.make_records(str(directory / "data"), 8)
  sft_run.write_json(directory / "data" / "train.json", sft_run.ranked(records))
  return directory


def _bytes_since(before: list) -> int:
  """Bytes of all arrays on devices that were not there before."""
  gc.collect()
  # Not of shards: to look at one of another test's array makes one more array.
  known = {id(x) for x in before}
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize * len(x.sharding.device_set)
    for x in jax.live_arrays()
    if id(x) not in known
  )


def _device_bytes(tree) -> int:
  """Of shapes with shardings, on one device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


@pytest.mark.parametrize("name", RUNS)
def test_bytes_that_a_run_holds(name, directory, tmp_path, monkeypatch):
  """After a step: parameters, moments, and of the reference as much as there must be."""
  overrides, more = RUNS[name]
  overrides |= {"model.remat": "full", "train.vision": False}
  found = {}

  def run(config, workdir, stage, state, progress, batches, manager, steps):
    rows = stage.to_device(next(iter(batches)))
    state, metrics = stage.train_step(state, rows)
    assert math.isfinite(metrics["loss"])
    found["rows"] = sum(x.nbytes for x in rows.values())
    found["live"] = _bytes_since(before)
    found["trained"] = state.params

  monkeypatch.setattr(train_dpo.loop, "run", run)
  config = sft_run.make_config(
    directory / "model", directory / "data" / "train.json", "dpo", **overrides
  )
  gc.collect()
  before = jax.live_arrays()
  train_dpo.train_and_evaluate(config, str(tmp_path))
  model = train_step.model_config(config)
  plan = train_step.plan(config, model, topology.open_topology("cpu:1"))
  planned = sum(size for name, size in plan.resident.items() if name != "batch")
  assert planned == pytest.approx(found["live"] - found["rows"], rel=0.01)
  program = dpo.make_program(config, model, plan.mesh, 10)
  weights = trees.size(lora.base_params(program.params))
  trained = trees.size(found["trained"])
  adapters = trees.size(program.params) - weights
  moments = 2 * trained
  held = (found["live"] - found["rows"]) / 4  # float32
  assert held - moments - adapters == pytest.approx(weights + more * trained, rel=0.01)


def test_bytes_of_a_large_model_on_eight_devices():
  """Of 7B, split evenly: 2 bytes a weight once with adapters, and twice with a whole reference."""
  devices = topology.open_topology("v5e:2x4")

  def held(preset, **settings):
    config = presets.get_config(preset)
    config.dpo.update(settings)
    model = train_step.model_config(config)
    program = dpo.make_program(config, model, meshes.make_mesh(config.mesh, devices.devices), 10)
    weights = trees.size(lora.base_params(program.params))
    return program, weights, trees.size(program.state.params)

  program, weights, trained = held("llava15_7b_lora")
  assert 8 * _device_bytes(program.frozen) == pytest.approx(2 * weights, rel=0.01)
  assert 8 * _device_bytes(program.state) == pytest.approx(12 * trained, rel=0.01)
  assert trained < 0.05 * weights
  program, weights, trained = held("llava15_7b")
  frozen = weights - trained
  assert 8 * _device_bytes(program.frozen) == pytest.approx(2 * frozen, rel=0.01)
  assert 8 * _device_bytes(program.state) == pytest.approx(12 * trained, rel=0.01)
  program, weights, trained = held("llava15_7b", reference="step")
  assert 8 * _device_bytes(program.frozen) == pytest.approx(2 * (frozen + trained), rel=0.01)
