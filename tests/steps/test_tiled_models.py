"""Training steps of models whose pictures are several tiles equal those of torch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tests import parity, tiled_models
from tests.steps.test_gradients import check
from vlalign_jax import stages, trees
from vlalign_jax.data import encode_preferences
from vlalign_jax.data.conversations import Turn
from vlalign_jax.data.rows import answer_places
from vlalign_jax.losses import head
from vlalign_jax.optim import optimizer
from vlalign_jax.optim import state as training_state
from vlalign_jax.stages import defaults
from vlalign_jax.steps import accumulate, answers, sft, update

STEPS, CHUNK = 10, 16
OPTIM = defaults("sft").optim
OPTIM.update(learning_rate=3e-3, weight_decay=0.1, warmup_steps=0, warmup_ratio=0.0)
OPTIM.schedule = "constant"


@pytest.fixture(scope="module", params=tiled_models.COSTLY)
def model(request, tmp_path_factory):
  return tiled_models.make(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def examples(model):
  return [model.encoded(record) for record in tiled_models.records(model)]


@pytest.fixture(scope="module")
def rows(model, examples):
  return model.rows(tiled_models.layout_of(examples))


def gradients(model, rows):
  """Returns (mean loss, path -> gradient)."""

  @jax.jit
  def compute(params, rows):
    counts = sft.loss_denominators(rows)
    inputs = update.StepInputs({}, None, counts, jax.random.key(0))
    loss = sft.make_loss(inputs, graphdef=model.graphdef, chunk=CHUNK)
    total, _, grads = accumulate.sum_gradients(loss, params, rows, 1)
    return total / counts["loss"], jax.tree.map(lambda g: g / counts["loss"], grads)

  loss, grads = compute(model.params, rows)
  return float(loss), trees.flatten(jax.device_get(grads))


def test_gradients_of_every_tensor_equal_torch(model, examples, rows):
  model.torch_model.zero_grad()
  loss, _ = model.torch_loss(examples)
  loss.backward()
  tensors = {name: param.grad for name, param in model.torch_model.named_parameters()}
  unused = {name for name, grad in tensors.items() if grad is None}
  assert all(any(part in name for part in tiled_models.UNUSED) for name in unused), unused
  expected = float(loss.detach()), parity.as_params(model.config, tensors)
  found = gradients(model, rows)
  assert found[1].keys() == expected[1].keys()
  check(found, expected, 1e-4)


def test_ten_steps_give_the_losses_of_torch(model, examples, rows, tmp_path):
  params = jax.device_get(model.params)
  tx = optimizer.make_optimizer(OPTIM, params, STEPS)
  step = jax.jit(
    functools.partial(
      update.train_step,
      make_loss=functools.partial(sft.make_loss, graphdef=model.graphdef, chunk=CHUNK),
      denominators=sft.loss_denominators,
      metrics=stages.sft.metrics,
      optimizer=tx,
      learning_rate=optimizer.learning_rates(OPTIM, STEPS)["base"],
      accumulation=1,
      seed=0,
    )
  )
  state = training_state.init_state(params, tx)
  before = {name: x.clone() for name, x in model.torch_model.state_dict().items()}
  named = [
    (name, param)
    for name, param in model.torch_model.named_parameters()
    if not any(part in name for part in tiled_models.UNUSED)
  ]
  groups = [
    {"params": [x for _, x in named if x.ndim > 1], "weight_decay": OPTIM.weight_decay},
    {"params": [x for _, x in named if x.ndim == 1], "weight_decay": 0.0},
  ]
  adam = torch.optim.AdamW(
    groups, lr=OPTIM.learning_rate, betas=(OPTIM.b1, OPTIM.b2), eps=OPTIM.eps
  )
  losses = []
  for number in range(STEPS):
    adam.zero_grad()
    loss, count = model.torch_loss(examples)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([x for _, x in named], OPTIM.max_grad_norm)
    adam.step()
    state, metrics = step(state, {}, rows)
    assert float(metrics["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4), number
    assert float(metrics["learned_tokens"]) == count
    losses.append(float(loss.detach()))
  model.torch_model.load_state_dict(before)
  assert losses[-1] < 0.8 * losses[0]


def test_shared_prompts_equal_separate_rows(model):
  """Log-probabilities and their gradients, from which DPO and reward models learn."""
  said = ("a red cat", "the picture on the left", "no")
  shown = [("wide.png", "tall.png"), ()]
  options = tiled_models.TEMPLATE, model.source.tokenizer, model.source.layout
  shared, separate = [], []
  for seed, pictures in enumerate(shown):
    question = tiled_models.words(seed, 6)
    record = model.record(question, said[0], *pictures)
    turns = (Turn(record.turns[0].human, None),)
    ranked = dataclasses.replace(record, turns=turns, answers=said)
    shared.append(encode_preferences.encode_preferences(ranked, *options, 10_000).example)
    separate.append([model.encoded(model.record(question, one, *pictures)) for one in said])
  together = model.rows([shared])
  together |= {
    name: place[None] for name, place in answer_places(shared, [0, 1], 2, len(said)).items()
  }
  apart = model.rows([[example] for group in separate for example in group])

  def sums_of_shared(params):
    graph = nnx.merge(model.graphdef, params)
    return answers.log_probabilities(graph, together, mesh=None, chunk=CHUNK)[0]

  def sums_of_separate(params):
    graph = nnx.merge(model.graphdef, params)
    tokens = head.token_log_probabilities(
      graph(apart | sft.ONE_ANSWER),
      graph.head_kernel(),
      apart["targets"],
      apart["loss_mask"],
      chunk=CHUNK,
    )
    return jnp.sum(tokens, axis=1).reshape(len(shown), len(said))

  weights = np.arange(1.0, 7.0).reshape(2, 3) / 10

  def compute(function):
    value = lambda params: (jnp.sum(weights * (found := function(params))), found)  # noqa: E731
    (_, found), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(model.params)
    return np.asarray(found), trees.flatten(jax.device_get(grads))

  found, grads = compute(sums_of_shared)
  expected, expected_grads = compute(sums_of_separate)
  assert parity.relative_error(found, expected) < 1e-5
  check((0.0, grads), (0.0, expected_grads), 1e-4)
