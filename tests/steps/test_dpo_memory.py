"""DPO holds the base weights once with adapters, or where the reference's numbers are kept."""

import gc

import jax
import pytest

from tests import checkpoints, sft_run
from vlalign_jax import trees
from vlalign_jax.models import lora
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.steps import dpo
from vlalign_jax.training import start
from vlalign_jax.weights import load, source


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  directory = tmp_path_factory.mktemp("model")
  checkpoints.make_llava(str(directory))
  return directory


def size(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def live() -> int:
  gc.collect()
  return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize(
  ("overrides", "copies"),
  [
    ({"lora.rank": 2, "train.projector": False, "train.vision": False}, 1),
    ({"dpo.reference": "cache"}, 1),
    ({"dpo.reference": "step"}, 2),
  ],
)
def test_copies_of_the_base_weights_on_the_devices(directory, overrides, copies):
  config = sft_run.make_config(directory, "unused", "dpo", **overrides)
  opened = source.open_for(config)
  program = dpo.make_program(config, opened.config, meshes.make_mesh(config.mesh), 10)
  base, adapters = size(lora.base_params(program.params)), 0
  flat = trees.flatten(program.params)
  adapters = size([leaf for path, leaf in flat.items() if lora.is_adapter(path)])
  assert bool(adapters) == ("lora.rank" in overrides)
  assert size(program.state.params) + size(program.frozen) == copies * base + adapters

  before = live()
  frozen = start.load_frozen(config, opened, program)
  wanted = trees.flatten(program.state.params)
  trained = load.load_params(opened, program.params, config.seed, lambda path: path in wanted)
  assert size(frozen) + size(trained) == copies * base + adapters
  assert live() - before == pytest.approx(copies * base + adapters, rel=0.01, abs=1000)
