"""Four roles as adapters over one base: it is on the devices once, and the numbers are the same."""

import dataclasses
import gc

import jax
import numpy as np
import pytest

from configs import reward
from scripts import train_reward
from tests import sft_run
from tests.rollout import tiny_ppo
from vlalign_jax import trees
from vlalign_jax.models import lora
from vlalign_jax.planning import ppo, topology
from vlalign_jax.rollout import learn, roles
from vlalign_jax.sharding import hosts

ADAPTERS = {"lora.rank": 2, "lora.alpha": 4.0, "train.vision": False, "train.projector": False}


@pytest.fixture(scope="module")
def files(tmp_path_factory, compile_cache):
  """With a reward model that is a run of adapters on the actor's weights."""
  directory = tmp_path_factory.mktemp("ppo")
  files = tiny_ppo.make(str(directory))
  records = sft_run.make_records(str(directory), 4)
  for record in records:
    right = record["conversations"][-1]["value"]
    record["conversations"][-1]["value"] = [right, "gray as the sky"]
  config = reward.get_config("demo")
  config.update_from_flattened_dict(
    ADAPTERS
    | {
      "model.init_from": f"{directory}/actor",
      "data.train": sft_run.write_json(directory / "ranked.json", records),
      "lora.dropout": 0.05,  # which PPO has not
      "data.max_length": 192,
      "batch_size": 4,
      "max_steps": 2,
      "optim.learning_rate": 0.05,
    }
  )
  train_reward.train_and_evaluate(config, f"{directory}/reward_run")
  return files


def first_step(run):
  with run.train.batches() as batches:
    rows = next(batches)
  del rows["skipped"]
  step = learn.make_train_step(run.held, run.train, run.records)
  state, metrics, _ = step(run.state, hosts.to_device(run.held.mesh, rows), {})
  return state, metrics


def size(*trees_of_arrays) -> int:
  """Elements of all different arrays."""
  arrays = {id(leaf): leaf.size for tree in trees_of_arrays for leaf in jax.tree.leaves(tree)}
  return sum(arrays.values())


def bytes_since(before: list) -> int:
  """Bytes of all arrays on devices that were not there before."""
  gc.collect()
  known = {id(array) for array in before}
  return sum(array.nbytes for array in jax.live_arrays() if id(array) not in known)


def with_whole_reward(open_sources):
  """As `roles.open_sources`, with the reward model's adapters merged into weights of its own."""

  def opened(*arguments):
    sources = open_sources(*arguments)
    reward = sources.reward
    reward = dataclasses.replace(
      reward,
      config=dataclasses.replace(reward.config, lora=None),
      runs=(*reward.runs, reward.start.run),
      start=None,
    )
    return dataclasses.replace(sources, reward=reward)

  return opened


@pytest.mark.slow
def test_one_base_for_all(files, tmp_path, monkeypatch):
  config = files.config(**ADAPTERS, **{"ppo.reward_model": f"{files.directory}/reward_run"})
  gc.collect()
  before = jax.live_arrays()
  run = tiny_ppo.make_run(files, config, str(tmp_path / "shared"))
  held = run.held
  base = size(held.frozen)
  own = [path for path in trees.flatten(held.reward) if lora.is_adapter(path)]
  assert own
  assert held.reference == {}
  more = size(held.frozen, held.critic_frozen, held.reward) - base
  assert more == sum(trees.flatten(held.reward)[path].size for path in [*own, "score/kernel"])
  # Of what is trained also two moments; all in float32.
  trained = size(run.state.params, run.state.critic.params)
  assert trained == 2 * more - run.model.language.width  # the actor has no score head
  assert bytes_since(before) == pytest.approx(4 * (base + more + 3 * trained), rel=0.05)
  planned = ppo.plan(config, topology.open_topology("cpu:1"))
  held_bytes = sum(planned.resident.values()) - planned.resident["batch of a rollout"]
  assert held_bytes == pytest.approx(4 * (base + more + 3 * trained), rel=1e-3)
  assert held.same_tower_critic
  assert held.same_tower_reward
  start = trees.flatten(run.state.critic.params)
  for path in own:  # the critic begins as the reward model
    np.testing.assert_array_equal(start[path], trees.flatten(held.reward)[path])

  _, metrics = first_step(run)
  monkeypatch.setattr(roles.identity, "identities", lambda opened, files: {})
  monkeypatch.setattr(roles, "open_sources", with_whole_reward(roles.open_sources))
  apart = tiny_ppo.make_run(files, config, str(tmp_path / "apart"))
  head = size(held.frozen["language"]["head"])  # which reward model and critic are without
  whole = size(apart.held.frozen, apart.held.critic_frozen, apart.held.reward)
  assert whole == 3 * base - 2 * head + run.model.language.width
  _, expected = first_step(apart)
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
