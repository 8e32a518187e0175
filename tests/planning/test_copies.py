"""The copies of a model's weights that DPO holds: in a run, and as planned on many devices."""

import gc
import math

import jax
import pytest

from configs import dpo as presets
from scripts import train_dpo
from tests import sft_run, tiny_models
from tests.planning import small
from vlalign_jax import trees
from vlalign_jax.models import lora
from vlalign_jax.planning import topology
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.stages import dpo
from vlalign_jax.training import loop

ADAPTERS = {"lora.rank": 2, "train.projector": False, "dpo.reference": "step"}
# Name -> (settings, copies of the trained weights that the reference adds).
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
  """Returns the bytes of all arrays on devices that are new since `before`."""
  gc.collect()
  # Without looking at shards: that would make an array of each.
  known = {id(x) for x in before}
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize * len(x.sharding.device_set)
    for x in jax.live_arrays()
    if id(x) not in known
  )


def _device_bytes(tree) -> int:
  """Returns the bytes on one device of shapes with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


@pytest.mark.parametrize("name", RUNS)
def test_bytes_that_a_run_holds(name, directory, tmp_path, monkeypatch):
  """Holds parameters and moments after a step, and no more of the reference than it needs."""
  overrides, reference_copies = RUNS[name]
  overrides |= {"model.remat": "full", "train.vision": False}
  measured = {}

  def run(config, workdir, functions, state, progress, batches, manager, steps, *_):
    batch = functions.to_device(next(iter(batches)))
    state, metrics, _ = functions.train_step(state, batch, {})
    assert math.isfinite(metrics["loss"])
    measured["bytes"] = _bytes_since(before) - sum(x.nbytes for x in batch.values())
    measured["trained"] = state.params

  monkeypatch.setattr(loop, "run", run)
  config = sft_run.make_config(
    directory / "model", directory / "data" / "train.json", "dpo", **overrides
  )
  gc.collect()
  before = jax.live_arrays()
  train_dpo.train_and_evaluate(config, str(tmp_path))
  model = small.model_config(config)
  plan = small.plan(config, model, topology.open_topology("cpu:1"))
  planned = sum(size for name, size in plan.resident.items() if name != "batch")
  assert planned == pytest.approx(measured["bytes"], rel=0.01)
  program = dpo.make_program(config, model, plan.mesh, 10)
  weights = trees.size(lora.base_params(program.params))
  trained = trees.size(measured["trained"])
  adapters = trees.size(program.params) - weights
  copies = measured["bytes"] / 4 - 2 * trained - adapters  # float32, without moments and adapters
  assert copies == pytest.approx(weights + reference_copies * trained, rel=0.01)


def test_bytes_of_a_large_model_on_eight_devices():
  """Splits 7B evenly: 2 bytes a weight with adapters, and again those of a full reference."""
  devices = topology.open_topology("v5e:2x4")

  def make_program(preset, **settings):
    config = presets.get_config(preset)
    config.dpo.update(settings)
    model = small.model_config(config)
    program = dpo.make_program(config, model, meshes.make_mesh(config.mesh, devices.devices), 10)
    weights = trees.size(lora.base_params(program.params))
    return program, weights, trees.size(program.state.params)

  program, weights, trained = make_program("llava15_7b_lora")
  assert 8 * _device_bytes(program.frozen) == pytest.approx(2 * weights, rel=0.01)
  assert 8 * _device_bytes(program.state) == pytest.approx(12 * trained, rel=0.01)
  assert trained < 0.05 * weights
  program, weights, trained = make_program("llava15_7b")
  frozen = weights - trained
  assert 8 * _device_bytes(program.frozen) == pytest.approx(2 * frozen, rel=0.01)
  assert 8 * _device_bytes(program.state) == pytest.approx(12 * trained, rel=0.01)
  program, weights, trained = make_program("llava15_7b", reference="step")
  both = _device_bytes(program.frozen) + _device_bytes(program.reference)
  assert 8 * both == pytest.approx(2 * (frozen + trained), rel=0.01)
