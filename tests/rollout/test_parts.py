"""A rollout whose answers are sampled in parts: the same answers."""

import jax
import numpy as np
import pytest

from tests.rollout import tiny
from vlalign_jax.sharding import hosts


@pytest.fixture(scope="module")
def files(tmp_path_factory, compile_cache):
  return tiny.make(str(tmp_path_factory.mktemp("ppo")))


def test_answers_do_not_depend_on_the_parts_they_are_sampled_in(files, tmp_path):
  found = []
  for parts in (1, 2):
    settings = {"ppo.sample_parts": parts, "ppo.num_samples": 2, "ppo.estimator": "rloo"}
    run = tiny.make_run(files, files.config(**settings), str(tmp_path / str(parts)))
    with run.train.batches() as batches:
      rows = next(batches)
    del rows["skipped"]
    rows = hosts.to_device(run.held.mesh, rows)
    streams = np.arange(len(rows["tokens"]), dtype=np.int32)
    params = run.state.params | {
      part: tree for part, tree in run.held.frozen.items() if part != "reference"
    }
    found.append(jax.device_get(run.held.program.sample(params, rows, streams, 7)))
  whole, by_parts = found
  for name in ("tokens", "lengths", "ended"):
    np.testing.assert_array_equal(getattr(whole, name), getattr(by_parts, name))
  np.testing.assert_allclose(whole.log_probabilities, by_parts.log_probabilities, atol=1e-5)
  assert len(set(whole.lengths.ravel().tolist())) > 1
