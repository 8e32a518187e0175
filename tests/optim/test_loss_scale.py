"""Loss scaling: float16 follows float32, and a scale that overflows is reduced."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scripts import train_sft
from tests import sft_run, tiny_models
from vlalign_jax.optim import loss_scale, state


@pytest.fixture(scope="module")
def directory(tmp_path_factory, compile_cache):
  directory = tmp_path_factory.mktemp("float16")
  tiny_models.make_llava(str(directory / "model"))
  records = sft_run.make_records(str(directory / "data"), 24)
  sft_run.write_json(directory / "data" / "train.json", records)
  return directory


def train(directory, workdir, dtype, **overrides):
  config = sft_run.make_config(
    directory / "model",
    directory / "data" / "train.json",
    **(
      {"model.dtype": dtype, "batch_size": 8, "num_train_epochs": 4.0, "train.vision": True}
      | overrides
    ),
  )
  train_sft.train_and_evaluate(config, str(workdir))
  return sft_run.read_metrics(str(workdir))


@pytest.mark.slow
def test_float16_follows_float32(directory, tmp_path):
  float16 = train(directory, tmp_path / "float16", "float16", grad_accumulation=2)
  float32 = train(directory, tmp_path / "float32", "float32")
  for key in ("loss", "grad_norm"):
    computed, expected = (np.array([line[key] for line in lines]) for lines in (float16, float32))
    np.testing.assert_allclose(computed, expected, rtol=2e-2, err_msg=key)
  assert {line["loss_scale"] for line in float16} == {loss_scale.FIRST}
  assert float16[-1]["skipped_steps"] == 0
  assert "loss_scale" not in float32[0]


def test_a_scale_that_overflows_is_reduced(directory, tmp_path, monkeypatch):
  """It is halved until it fits, even if that takes more than ten updates."""
  monkeypatch.setattr(loss_scale, "FIRST", 2.0**40)
  monkeypatch.setattr(loss_scale, "MOST", 2.0**40)
  lines = train(directory, tmp_path, "float16", num_train_epochs=10.0)
  skipped = int(lines[-1]["skipped_steps"])
  assert 10 < skipped < len(lines)
  assert lines[-1]["loss_scale"] == 2.0 ** (40 - skipped)
  first = next(n for n, line in enumerate(lines) if line["skipped_steps"] == n)
  assert first > 10
  assert lines[first]["learning_rate"] == lines[0]["learning_rate"]
  assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_scale_over_time(monkeypatch):
  monkeypatch.setattr(loss_scale, "WINDOW", 3)
  params = {"a": jnp.ones(2)}
  optimizer = loss_scale.scale(optax.sgd(0.1))
  now, good, bad = state.init_state(params, optimizer), jnp.ones(2), jnp.full(2, jnp.inf)
  scales = []
  for gradient in (good, good, bad, good, good, good, good):
    now, logged = state.apply_gradients(now, optimizer, {"a": gradient}, jnp.float32(1))
    scales.append(float(loss_scale.factor(now.optimizer)) / loss_scale.FIRST)
    assert logged["skipped_in_a_row"] == 0
  assert scales == [1, 1, 0.5, 0.5, 0.5, 1, 1]
  np.testing.assert_allclose(now.params["a"], 1 - 0.1 * 6, rtol=1e-6)


def test_overflows_that_no_scale_avoids_count_in_a_row():
  optimizer = loss_scale.scale(optax.sgd(0.1))
  first = state.init_state({"a": jnp.ones(2)}, optimizer)
  least = first._replace(optimizer=first.optimizer._replace(factor=jnp.float32(1)))
  overflow = {"a": jnp.full(2, jnp.inf)}
  for before, loss in ((least, 1.0), (first, np.nan)):
    now = before
    for times in (1, 2):
      now, logged = state.apply_gradients(now, optimizer, overflow, jnp.float32(loss))
      assert int(logged["skipped_in_a_row"]) == times
    assert float(now.optimizer.factor) >= loss_scale.LEAST
