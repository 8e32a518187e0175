"""Sampler, learner and reference have the same support, whatever the sampling settings are."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.rollout import tiny_ppo
from vlalign_jax.generation import sampling as samplings
from vlalign_jax.rollout import learn
from vlalign_jax.sharding import hosts

SETTINGS = {
  "batch_size": 4,
  "ppo.num_generations": 2,
  "ppo.num_ppo_epochs": 1,
  "ppo.num_mini_batches": 1,
  "ppo.min_new_tokens": 4,
  "ppo.temperature": 1.5,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory, compile_cache):
  return tiny_ppo.make(str(tmp_path_factory.mktemp("ppo")))


def test_a_policy_that_equals_its_reference_has_no_divergence(files, tmp_path):
  """Its stop tokens, a fifth of the vocabulary, are forbidden in four of six tokens."""
  run = tiny_ppo.make_run(files, files.config(**SETTINGS), str(tmp_path))
  assert len(run.sampling.stop_tokens) > 50
  with run.train.batches() as batches:
    rows = next(batches)
  del rows["skipped"]
  seen = []
  show = lambda *found: seen.append(found)  # noqa: E731
  step = learn.make_train_step(run.held, run.train, run.records, show)
  _, metrics, _ = step(run.state, hosts.to_device(run.held.mesh, rows), {})
  rollout = seen[0][1]
  assert rollout.lengths.min() >= 4
  assert abs(metrics["objective/kl"]) < 1e-5
  assert metrics["val/sampler_gap"] < 1e-5
  # Nothing but the forbidden was left out: the sampler drew from the policy itself.
  np.testing.assert_allclose(rollout.drawn, rollout.log_probabilities, atol=1e-5)
  assert metrics["policy/cut_probability"] < 1e-5


@pytest.mark.parametrize("cut", [{"top_k": 4}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.8}])
def test_what_top_k_and_top_p_cut_off_is_the_difference(cut):
  """1 - exp(policy - drawn) is the probability of what was cut off, by sorting in float64."""
  V, steps = 40, np.array([1, 0, 1])
  logits = 2 * np.random.default_rng(0).normal(size=(3, 5, V)).astype(np.float32)
  settings = samplings.Sampling(
    max_new_tokens=9, stop_tokens=(3, 11), min_new_tokens=2, suppress=(7,), temperature=1.3, **cut
  )
  settings = dataclasses.replace(settings, tempered=True)
  keys = samplings.row_keys(0, np.arange(3), 5)
  choose = jax.jit(samplings.choose, static_argnums=4)
  tokens, logs, drawn = map(np.asarray, choose(logits, None, keys, steps, settings))
  assert not np.isin(tokens, (3, 7, 11)).any()
  found = -np.expm1(logs - drawn)
  for place in np.ndindex(3, 5):
    x = logits[place].astype(np.float64) / 1.3
    x[[3, 7, 11]] = -np.inf
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    assert logs[place] == pytest.approx(np.log(p[tokens[place]]), abs=1e-5)
    kept = np.sort(p)[::-1][: cut.get("top_k", V)]
    among = kept / kept.sum()
    kept = kept[: int(np.sum(np.cumsum(among) - among < cut.get("top_p", 1.0)))]
    assert found[place] == pytest.approx(1 - kept.sum(), abs=1e-5)
  assert found.min() > 0.01
