"""How a rollout is dealt out to updates: alike on every mesh, and only what is learned from."""

import numpy as np
import pytest

from tests.rollout import tiny_ppo
from vlalign_jax.errors import InputError
from vlalign_jax.rollout import learn
from vlalign_jax.sharding import hosts


@pytest.fixture(scope="module")
def files(tmp_path_factory, compile_cache):
  return tiny_ppo.make(str(tmp_path_factory.mktemp("ppo")))


def test_rows_that_fill_up_change_nothing():
  learned = np.array([5, 2, 0, 7, 3])
  exact = learn.mini_batches(learned, 8, 2)
  assert [list(part) for part in exact] == [[5, 2, 0, 1], [7, 3, 4, 6]]
  more = learn.mini_batches(learned, 16, 2)  # as many devices more have
  for few, many in zip(exact, more, strict=True):
    assert len(many) == 8
    assert set(few) & set(learned) == set(many) & set(learned)
  assert sorted(np.concatenate(more)) == list(range(16))


def test_mini_batches_of_nothing_are_left_out():
  assert [list(part) for part in learn.mini_batches(np.array([3]), 4, 2)] == [[3, 0]]
  assert learn.mini_batches(np.array([], int), 4, 2) == []


@pytest.mark.slow
def test_a_last_step_of_few_prompts_is_reported_and_learned_as_others(files, tmp_path):
  settings = {
    "ppo.estimator": "rloo",
    "ppo.num_generations": 2,
    "data.samples": "5",
    "num_train_epochs": 1.0,
  }
  run = tiny_ppo.make_run(files, files.config(**settings, max_steps=-1), str(tmp_path))
  assert list(run.train.plan.row_counts) == [4, 4]
  step, state = learn.make_train_step(run.held, run.train, run.records), run.state
  carried = {}
  with run.train.batches() as batches:
    for rows in batches:
      del rows["skipped"]
      state, metrics, carried = step(state, hosts.to_device(run.held.mesh, rows), carried)
  # One prompt is left for the second step: one mini-batch in each of four epochs.
  assert metrics["val/updates"] == 4
  assert metrics["val/ratio"] == pytest.approx(1, abs=0.05)
  assert 0 < metrics["val/sampler_gap"] < 1e-5
  assert int(state.actor.step) == 8 + 4


def test_an_actor_that_would_never_learn_is_refused(files, tmp_path):
  config = files.config(**{"ppo.critic_warmup": 2})
  with pytest.raises(InputError, match="critic_warmup is 2, and the run has 2 steps"):
    tiny_ppo.make_run(files, config, str(tmp_path))
