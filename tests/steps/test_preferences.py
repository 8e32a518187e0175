"""DPO and the reward model on rows with shared prompts, against separate rows and torch's LLaVA."""

import copy
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from tests import parity, tiny_models
from tests.process_group import cpu_devices
from tests.steps import preference_rows
from tests.steps.shared_prompts import EXAMPLES, LAYOUT, RUNS
from vlalign_jax import trees
from vlalign_jax.optim import optimizer
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.stages import defaults, dpo
from vlalign_jax.steps import answers

STEPS, BETA, LABEL_SMOOTHING, SFT_WEIGHT = 20, 0.5, 0.1, 0.3


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return str(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def torch_model(directory):
  return tiny_models.make_llava(directory)


@pytest.fixture(scope="module")
def errors(directory, torch_model):
  done = subprocess.run(
    [sys.executable, "-m", "tests.steps.shared_prompts", directory],
    env=os.environ | cpu_devices(8),
    capture_output=True,
    text=True,
    cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_shared_prompts_equal_separate_rows(name, errors):
  found = errors[name]
  assert set(found["dpo answers"]) == set(found["reward answers"]) == {"2", "3", "4", "5"}
  assert "vision/patch_embedding/kernel" in found["dpo gradients"]
  assert "score/kernel" in found["reward gradients"]
  for key, value in found.items():
    for part, error in value.items() if isinstance(value, dict) else [("", value)]:
      assert error < 1e-5, (key, part)


def make_examples(config):
  """(examples, their pictures, a packed batch of them)."""
  made = [
    preference_rows.make_preference(config, prompt, lengths, images, seed)
    for seed, (prompt, lengths, images) in enumerate(EXAMPLES)
  ]
  pictures = parity.make_pictures(3, config.vision.image_size)
  return made, pictures, preference_rows.shared_rows(config, made, LAYOUT, pictures)


def torch_log_probabilities(model, config, preference, pictures):
  """float32[K], summed over the tokens of each answer."""
  sums = []
  for example in preference.separate:
    logits = parity.torch_logits(model, config, example, pictures)
    every = torch.log_softmax(logits, dim=-1)
    chosen = every.gather(1, torch.tensor(example.targets).long()[:, None])[:, 0]
    sums.append((chosen * torch.tensor(example.loss_mask)).sum())
  return torch.stack(sums)


def test_log_probabilities_equal_torch(directory, torch_model):
  source, graphdef, params = parity.open_model(directory)
  made, pictures, rows = make_examples(source.config)

  @jax.jit
  def compute(params, rows):
    return answers.log_probabilities(nnx.merge(graphdef, params), rows, mesh=None, chunk=16)

  found = np.asarray(compute(params, rows))
  for row, numbers in enumerate(LAYOUT):
    for segment, number in enumerate(numbers):
      with torch.no_grad():
        expected = torch_log_probabilities(torch_model, source.config, made[number], pictures)
      K = len(expected)
      assert parity.relative_error(found[row, segment, :K], expected) < 1e-5
      assert (rows["answers"][row, segment] >= 0).sum() == K


def torch_dpo(model, base, config, made, pictures):
  """(mean loss over examples, mean margin of the best answer over the others) of DPO."""
  losses, margins, nll, tokens = [], [], 0.0, 0
  for preference, initial in zip(made, base, strict=True):
    logps = torch_log_probabilities(model, config, preference, pictures)
    scores = BETA * (logps - initial)
    forward = sum(torch.logsumexp(scores[k:], 0) - scores[k] for k in range(len(scores)))
    backward = sum(torch.logsumexp(scores[: k + 1], 0) - scores[k] for k in range(len(scores)))
    losses.append((1 - LABEL_SMOOTHING) * forward + LABEL_SMOOTHING * backward)
    margins.append(float((scores[0] - scores[1:].mean()).detach()))
    nll = nll - logps[0]
    tokens += int(preference.separate[0].loss_mask.sum())
  return torch.stack(losses).mean() + SFT_WEIGHT * nll / tokens, np.mean(margins)


def make_config():
  c = defaults("dpo")
  c.model.update(dtype="float32", remat="none")
  c.optim.update(learning_rate=3e-3, weight_decay=0.1, warmup_steps=4)
  c.dpo.update(loss="sigmoid", beta=BETA, label_smoothing=LABEL_SMOOTHING, sft_weight=SFT_WEIGHT)
  return c


def test_twenty_steps_of_dpo_give_the_losses_of_torch(directory, torch_model):
  model, c = copy.deepcopy(torch_model), make_config()
  source, _, params = parity.open_model(directory)
  made, pictures, rows = make_examples(source.config)
  mesh = meshes.make_mesh(c.mesh, jax.devices()[:1])
  program = dpo.make_program(c, source.config, mesh, STEPS)
  params, frozen = trees.split(params, functools.partial(optimizer.is_trained, config=c))
  assert "vision" in frozen  # computed once, for the policy and the reference
  initial = jax.tree.map(jnp.copy, params)
  state = program.init_state(params)

  model.model.vision_tower.requires_grad_(False)
  trained = [param for param in model.parameters() if param.requires_grad]
  groups = [
    {"params": [p for p in trained if p.ndim > 1], "weight_decay": c.optim.weight_decay},
    {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
  ]
  adam = torch.optim.AdamW(
    groups, lr=c.optim.learning_rate, betas=(c.optim.b1, c.optim.b2), eps=c.optim.eps
  )
  scheduler = transformers.get_scheduler("cosine", adam, c.optim.warmup_steps, STEPS)
  with torch.no_grad():
    base = [torch_log_probabilities(torch_model, source.config, one, pictures) for one in made]
  losses = []
  for number in range(STEPS):
    adam.zero_grad()
    loss, margin = torch_dpo(model, base, source.config, made, pictures)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, c.optim.max_grad_norm)
    adam.step()
    scheduler.step()
    state, metrics = program.train_step(state, frozen, rows, initial)
    loss = float(loss.detach())
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-4), number
    assert float(metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-3), number
    assert float(metrics["rewards/margins"]) == pytest.approx(margin, rel=1e-4, abs=1e-5), number
    losses.append(loss)
  assert losses[-1] < 0.8 * losses[0]
  assert margin > 1
  found = trees.flatten(jax.device_get(state.params))
  expected = parity.as_params(source.config, model.state_dict())
  for path, param in found.items():
    assert parity.relative_error(param, expected[path]) < 1e-4, path
