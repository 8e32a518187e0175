"""Work that a rollout does not do at once, or not again: parts of it, and its pictures."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.rollout import tiny_ppo
from vlalign_jax import trees
from vlalign_jax.input_pipeline import prompts
from vlalign_jax.models import clip
from vlalign_jax.rollout import collect, learn
from vlalign_jax.sharding import hosts


@pytest.fixture(scope="module")
def files(tmp_path_factory, compile_cache):
  return tiny_ppo.make(str(tmp_path_factory.mktemp("ppo")))


def first_rows(run) -> dict:
  with run.train.batches() as batches:
    rows = next(batches)
  del rows["skipped"]
  return hosts.to_device(run.held.mesh, rows)


@pytest.mark.parametrize("setting", [{"ppo.sample_parts": 2}, {"ppo.slots": 2}])
def test_answers_do_not_depend_on_how_many_are_sampled_at_a_time(setting, files, tmp_path):
  found = []
  for number, changed in enumerate(({}, setting)):
    settings = changed | {"ppo.num_generations": 2, "ppo.estimator": "rloo"}
    run = tiny_ppo.make_run(files, files.config(**settings), str(tmp_path / str(number)))
    rows = first_rows(run)
    streams = np.arange(len(rows["tokens"]), dtype=np.int32)
    params = run.held.sampler.place(trees.merge(run.state.params, run.held.frozen))
    found.append(jax.device_get(run.held.sampler.sample(params, rows, streams, 7)))
  whole, by_parts = found
  for name in ("tokens", "lengths", "ended"):
    np.testing.assert_array_equal(getattr(whole, name), getattr(by_parts, name))
  np.testing.assert_allclose(whole.log_probabilities, by_parts.log_probabilities, atol=1e-5)
  assert len(set(whole.lengths.ravel().tolist())) > 1


@pytest.mark.parametrize("setting", [{"ppo.sample_parts": 2}, {"ppo.slots": 2}])
def test_the_function_scores_while_others_are_sampled(setting, files, tmp_path):
  """Scores are those that answers get when all are there, and each answer is scored once."""
  found, calls = [], []
  for number, changed in enumerate(({}, setting)):
    settings = {
      "ppo.num_generations": 2,
      "ppo.estimator": "rloo",
      "ppo.reward_model": "",
      "ppo.reward_function": "tests.rollout.scorers:length",
    }
    run = tiny_ppo.make_run(files, files.config(**settings | changed), str(tmp_path / str(number)))
    sampler, function, before = run.held.sampler, run.held.function, []

    def score(record, answer, function=function):
      calls.append((record.id, answer))
      return function(record, answer)

    def sample(*given, sampler=sampler, before=before):
      answers = sampler.sample(*given)
      before.append(len(calls))
      return answers

    held = dataclasses.replace(
      run.held, function=score, sampler=dataclasses.replace(sampler, sample=sample)
    )
    rows = first_rows(run)
    numbers = prompts.record_numbers(run.train.plan, 0)
    records = [run.records[number] for number in numbers]
    calls.clear()
    found.append(collect.collect(held, run.state, rows, records, numbers, 7))
    assert len(calls) == 2 * len(records)
    assert bool(before[0]) == bool(changed)
  np.testing.assert_array_equal(found[0].scores, found[1].scores)
  assert len(set(found[0].scores.ravel().tolist())) > 2


def test_pictures_go_once_through_a_tower_that_stays(files, tmp_path, monkeypatch):
  """Of a whole step nothing looks at pictures but the one program for that."""
  config = files.config(
    **{
      "lora.rank": 2,
      "train.vision": False,
      "train.projector": False,
      "ppo.critic_init": "actor",
      "ppo.reward_model": "",
      "ppo.reward_function": "tests.rollout.scorers:length",
    }
  )
  run = tiny_ppo.make_run(files, config, str(tmp_path))
  held, rows = run.held, first_rows(run)
  params = trees.merge(run.state.params, held.frozen)
  held.program.vision_features(params, rows, None)  # it is compiled now

  def looks(*_, **__):
    raise AssertionError("pictures go through the tower again")

  monkeypatch.setattr(clip.VisionTower, "__call__", looks)
  step = learn.make_train_step(held, run.train, run.records)
  _, metrics, _ = step(run.state, rows, {})
  assert np.isfinite(metrics["loss"])
