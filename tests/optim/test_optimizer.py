"""Which parameters are trained, which decay and at what rate each moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests import parity, tiny_models
from vlalign_jax import trees
from vlalign_jax.models import vlm
from vlalign_jax.optim import optimizer
from vlalign_jax.optim import state as training_state
from vlalign_jax.stages import defaults

EMBEDDING = "language/embedding/embedding"
BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
  """Returns path -> shape and dtype of a LLaVA with every bias."""
  directory = tmp_path_factory.mktemp("llava")
  tiny_models.make_llava(directory, text=BIASES)
  source, _, _ = parity.open_model(directory)
  return trees.flatten(vlm.abstract_params(source.config)[1])


def optim_group(**keys):
  optim = defaults("sft").optim
  optim.update({"schedule": "constant", "max_grad_norm": 0.0, **keys})
  return optim


def one_update(optim, params, gradients):
  """Returns path -> the difference that the first update makes."""
  tx = optimizer.make_optimizer(optim, params, 10)
  updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
  return trees.flatten(updates)


def test_every_matrix_decays_and_nothing_else(shapes):
  params = trees.unflatten({path: jnp.full(leaf.shape, 2.0) for path, leaf in shapes.items()})
  still = jax.tree.map(jnp.zeros_like, params)
  updates = one_update(optim_group(learning_rate=0.1, weight_decay=0.5), params, still)
  decaying = {path for path, update in updates.items() if np.any(update != 0)}
  for path in decaying:
    np.testing.assert_allclose(updates[path], -0.1 * 0.5 * 2.0, rtol=1e-6)
  assert shapes.keys() - decaying == {
    path
    for path in shapes
    if path.endswith(("/bias", "/scale")) or path == "vision/class_embedding"
  }
  assert {EMBEDDING, "language/head/kernel", "vision/patch_embedding/kernel"} < decaying
  assert "vision/position_embedding" in decaying


@pytest.mark.parametrize("text", [BIASES, {"model_type": "qwen3"}])
def test_parameters_that_are_matrices_in_torch_decay(text, tmp_path):
  model = tiny_models.make_llava(tmp_path, text=text)
  source, _, params = parity.open_model(tmp_path)
  matrices = {
    name: torch.full((), float(param.ndim > 1)).expand(param.shape)
    for name, param in model.named_parameters()
  }
  expected = parity.as_params(source.config, matrices)
  for path, leaf in trees.flatten(params).items():
    assert optimizer.decays(path, leaf) == bool(expected[path].all()), path


def test_each_group_moves_at_its_own_rate(shapes):
  params = trees.unflatten({path: jnp.zeros(leaf.shape) for path, leaf in shapes.items()})
  ones = jax.tree.map(jnp.ones_like, params)
  optim = optim_group(learning_rate=0.1, embedding_learning_rate=0.01, projector_learning_rate=0.0)
  for path, update in one_update(optim, params, ones).items():
    part = path.split("/")[0]
    rate = 0.01 if path == EMBEDDING else {"projector": 0.0}.get(part, 0.1)
    # Adam's first update is the sign of the gradient.
    np.testing.assert_allclose(update, -rate, rtol=1e-5, err_msg=path)
  optim = optim_group(learning_rate=0.1, vision_learning_rate=0.02)
  for path, update in one_update(optim, params, ones).items():
    rate = 0.02 if path.startswith("vision/") else 0.1
    np.testing.assert_allclose(update, -rate, rtol=1e-5, err_msg=path)
  optim = optim_group(learning_rate=0.1)
  for update in one_update(optim, params, ones).values():
    np.testing.assert_allclose(update, -0.1, rtol=1e-5)


def test_groups_follow_one_schedule():
  optim = optim_group(
    learning_rate=0.1,
    projector_learning_rate=1.0,
    vision_learning_rate=0.01,
    schedule="cosine",
    warmup_ratio=0.2,
  )
  rates = optimizer.learning_rates(optim, 50)
  assert rates.keys() == set(optimizer.GROUPS)
  for step in (0, 3, 10, 31, 49):
    base = float(rates["base"](step))
    assert float(rates["projector"](step)) == pytest.approx(10 * base, rel=1e-5)
    assert float(rates["embeddings"](step)) == base


def test_gradients_are_clipped_by_their_norm_over_all_groups():
  params = {"vision": {"a": jnp.zeros(3)}, "projector": {"b": jnp.zeros((2, 2))}}
  gradients = {"vision": {"a": jnp.full(3, 4.0)}, "projector": {"b": jnp.full((2, 2), -3.0)}}
  tx = optimizer.make_optimizer(optim_group(max_grad_norm=0.5), params, 10)
  _, after = tx.update(gradients, tx.init(params), params)
  norm = np.sqrt(3 * 16 + 4 * 9)
  moments = [leaf for leaf in jax.tree.leaves(after) if leaf.shape == (3,)]
  b1, b2 = optim_group().b1, optim_group().b2
  np.testing.assert_allclose(moments[0], (1 - b1) * 4 * 0.5 / norm, rtol=1e-5)
  np.testing.assert_allclose(moments[1], (1 - b2) * (4 * 0.5 / norm) ** 2, rtol=1e-5)


@pytest.mark.parametrize(
  ("keys", "moved"),
  [
    ({}, {"projector", "language", "embeddings"}),
    ({"vision": True}, {"vision", "projector", "language", "embeddings"}),
    ({"language": False}, {"projector"}),
    ({"embeddings": False}, {"projector", "language"}),
    ({"language": False, "embeddings": True}, {"projector", "embeddings"}),
    ({"projector": False, "language": False, "vision": True}, {"vision"}),
  ],
)
def test_the_train_flags_choose_parameters(keys, moved, shapes):
  config = defaults("sft")
  config.train.update(keys)
  for path in shapes:
    part = "embeddings" if path == EMBEDDING else path.split("/")[0]
    assert optimizer.is_trained(path, config) == (part in moved), path


def test_an_update_with_a_gradient_that_is_not_finite_is_skipped():
  params = {"projector": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
  tx = optimizer.make_optimizer(optim_group(), params, 10)
  state = training_state.init_state(params, tx)
  bad = {"projector": {"kernel": jnp.ones((2, 2)).at[0, 1].set(jnp.nan), "bias": jnp.ones(2)}}
  after, metrics = training_state.apply_gradients(state, tx, bad, jnp.float32(1.5))
  jax.tree.map(
    np.testing.assert_array_equal,
    (after.params, after.optimizer),
    (state.params, state.optimizer),
  )
  assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (1, 1, 1)
  assert float(metrics["loss"]) == 1.5
  good = jax.tree.map(jnp.ones_like, params)
  for loss, skipped, in_a_row in ((np.inf, 2, 2), (1.0, 2, 0), (np.nan, 3, 1)):
    after, metrics = training_state.apply_gradients(after, tx, good, jnp.float32(loss))
    assert (int(metrics["skipped_steps"]), int(metrics["skipped_in_a_row"])) == (skipped, in_a_row)
  assert np.all(after.params["projector"]["kernel"] < 1)
