"""A whole PPO step (rollout, four epochs of two mini-batches) against a plain loop in torch."""

import copy
import types

import jax
import numpy as np
import pytest
import torch

from tests import parity
from tests.rollout import tiny_ppo
from vlalign_jax import trees
from vlalign_jax.rollout import learn, pretraining
from vlalign_jax.sharding import hosts

SETTINGS = {
  "gae": {"ppo.num_generations": 2},
  "blank": {"ppo.blank_images": True},
  "rloo": {
    "ppo.estimator": "rloo",
    "ppo.num_generations": 3,
    "ppo.loss_level": "sequence",
    "ppo.temperature": 0.7,
  },
  "at least 3 tokens": {"ppo.num_generations": 2, "ppo.min_new_tokens": 3, "ppo.temperature": 1.3},
  "grpo": {
    "ppo.estimator": "grpo",
    "ppo.num_generations": 3,
    "ppo.loss_level": "answer",
    "ppo.entropy_coef": 0.03,
    "ppo.sft_weight": 0.7,
    "ppo.min_new_tokens": 2,
    "grad_accumulation": 2,
  },
}
COMMON = {"ppo.kl_coef": 0.2, "ppo.missing_eos_penalty": 0.5, "ppo.cliprange": 0.1}


@pytest.fixture(scope="module")
def files(tmp_path_factory, compile_cache):
  return tiny_ppo.make(str(tmp_path_factory.mktemp("ppo")))


class Torch:
  """The step as the papers have it, one answer after the other."""

  def __init__(self, files, config, run, rollout):
    self.c, self.p = config, config.ppo
    self.image, self.ends = run.model.image_token_id, list(run.sampling.stop_tokens)
    self.actor, self.reference = copy.deepcopy(files.actor), files.other
    self.scorer, self.scorer_kernel = files.scorer, files.kernel
    self.critic = copy.deepcopy(files.scorer)
    self.kernel = torch.nn.Parameter(files.kernel.clone())
    self.answers, plan = [], run.train.plan
    self.updates = config.ppo.num_ppo_epochs * config.ppo.num_mini_batches
    self.conversations = [
      [
        (example, tiny_ppo.inputs(run.model, example, pictures, ()))
        for example, pictures in tiny_ppo.examples_of(run.mixed, update)
      ]
      for update in range(self.updates if run.mixed else 0)
    ]
    self.order = np.argsort([plan.rows_of(0, row)[0] for row in range(plan.rows)])
    lengths, ended = jax.device_get((rollout.lengths, rollout.ended))
    for row, (example, pictures) in enumerate(tiny_ppo.examples_of(run.train)):
      group, judged = [], pictures
      if self.p.blank_images:
        judged = [np.full_like(picture, 127) for picture in pictures]
      for n, length in enumerate(lengths[row]):
        tokens = rollout.tokens[row, n, :length]
        given = tiny_ppo.inputs(run.model, example, pictures, tokens)
        answer = types.SimpleNamespace(inputs=given, tokens=tokens, ended=bool(ended[row, n]))
        answer.judged = tiny_ppo.inputs(run.model, example, judged, tokens)
        group.append(answer)
      self.answers.append(group)

  def log_probabilities(self, model, answer):
    """(log-probabilities, entropies) of the tokens, among those that the sampler may choose."""
    M = len(answer.tokens)
    logits = model(**answer.inputs).logits[0, -M - 1 : -1] / self.p.temperature
    forbidden = torch.zeros(logits.shape, dtype=torch.bool)
    forbidden[:, self.image] = True
    forbidden[: self.p.min_new_tokens, self.ends] = True
    policy = torch.distributions.Categorical(logits=logits.masked_fill(forbidden, -torch.inf))
    return policy.log_prob(torch.tensor(answer.tokens)), policy.entropy()

  def values(self, answer):
    hidden = self.critic.model(**answer.judged).last_hidden_state[0]
    return hidden[-len(answer.tokens) - 1 : -1] @ self.kernel

  def observe(self):
    with torch.no_grad():
      for answer in (answer for group in self.answers for answer in group):
        answer.old = self.log_probabilities(self.actor, answer)[0]
        answer.reference = self.log_probabilities(self.reference, answer)[0]
        hidden = self.scorer.model(**answer.judged).last_hidden_state[0, -1]
        answer.score = hidden @ self.scorer_kernel
        placed = answer.score - (0 if answer.ended else self.p.missing_eos_penalty)
        answer.clipped = placed.clamp(-self.p.score_clip, self.p.score_clip)
        answer.rewards = -self.p.kl_coef * (answer.old - answer.reference)
        answer.rewards[-1] += answer.clipped
        if self.p.estimator == "gae":
          self.generalised(answer)
      if self.p.estimator == "gae":
        every = torch.cat([a.advantages for group in self.answers for a in group])
        for answer in (answer for group in self.answers for answer in group):
          answer.advantages = (answer.advantages - every.mean()) / (every.var() + 1e-8).sqrt()
      else:
        self.relative()

  def generalised(self, answer):
    answer.old_values = self.values(answer)
    answer.advantages, carried = torch.zeros_like(answer.old), 0.0
    for t in reversed(range(len(answer.tokens))):
      following = answer.old_values[t + 1] if t + 1 < len(answer.tokens) else 0.0
      delta = answer.rewards[t] + self.p.gamma * following - answer.old_values[t]
      carried = delta + self.p.gamma * self.p.lam * carried
      answer.advantages[t] = carried
    answer.returns = answer.advantages + answer.old_values

  def relative(self):
    for group in self.answers:
      if self.p.estimator == "rloo":
        total = [a.rewards.sum() for a in group]
        for n, answer in enumerate(group):
          others = [one for m, one in enumerate(total) if m != n]
          answer.advantages = total[n] - sum(others) / len(others)
      else:
        total = torch.stack([a.clipped for a in group])
        for answer in group:
          answer.advantages = (answer.clipped - total.mean()) / (total.std() + 1e-4)

  def policy_loss(self, answers):
    terms, tokens = [], sum(len(a.tokens) for a in answers)
    for answer in answers:
      logps, entropies = self.log_probabilities(self.actor, answer)
      log_ratio = logps - answer.old
      if self.p.loss_level == "sequence":
        log_ratio = log_ratio.sum()
      ratio = log_ratio.exp()
      clipped = ratio.clamp(1 - self.p.cliprange, 1 + self.p.cliprange)
      loss = torch.maximum(-answer.advantages * ratio, -answer.advantages * clipped)
      if self.p.estimator == "grpo":
        r = answer.reference - logps
        loss = loss + self.p.kl_coef * (r.exp() - 1 - r)
      loss = loss - self.p.entropy_coef * entropies
      share = 1 / tokens if self.p.loss_level == "token" else 1 / len(answers)
      terms.append(share * (loss.sum() if self.p.loss_level == "token" else loss.mean()))
    return sum(terms)

  def sft_loss(self, conversations):
    """Mean over the learned tokens of all conversations."""
    total = count = 0.0
    for example, given in conversations:
      logs = torch.log_softmax(self.actor(**given).logits[0], dim=-1)
      chosen = logs.gather(1, torch.tensor(example.targets)[:, None].long())[:, 0]
      weights = torch.tensor(example.loss_mask)
      total, count = total - (chosen * weights).sum(), count + weights.sum()
    return total / count

  def value_loss(self, answers):
    errors = []
    for answer in answers:
      values = self.values(answer)
      near = torch.clamp(
        values,
        answer.old_values - self.p.cliprange_value,
        answer.old_values + self.p.cliprange_value,
      )
      errors.append(torch.maximum((values - answer.returns) ** 2, (near - answer.returns) ** 2))
    return torch.cat(errors).mean() / 2

  def learn(self):
    """The mean loss of policy and critic over all updates."""
    optim, losses = self.c.optim, {"loss": [], "critic/loss": [], "loss/sft": []}
    conversations = iter(self.conversations)

    def optimizer(params, rate):
      options = {"betas": (optim.b1, optim.b2), "eps": optim.eps, "weight_decay": 0.0}
      return torch.optim.AdamW(params, lr=rate, **options)

    sides = [("loss", self.policy_loss, list(self.actor.parameters()), optim.learning_rate)]
    if self.p.estimator == "gae":
      params = [*self.critic.parameters(), self.kernel]
      sides += [("critic/loss", self.value_loss, params, self.p.critic_learning_rate)]
    sides = [(*side[:3], optimizer(*side[2:])) for side in sides]
    for epoch in range(self.p.num_ppo_epochs):
      order = np.random.default_rng([self.c.seed, 0, epoch]).permutation(self.order)
      for index in np.split(order, self.p.num_mini_batches):
        answers = [answer for row in index for answer in self.answers[row]]
        for name, loss_of, params, adam in sides:
          adam.zero_grad()
          loss = loss_of(answers)
          if self.conversations:
            mixed = self.sft_loss(next(conversations))
            losses["loss/sft"].append(mixed.item())
            loss = loss + self.p.sft_weight * mixed
          loss.backward()
          losses[name].append(loss.item())
          grads = [p.grad for p in params if p.grad is not None]
          norm = torch.sqrt(sum((g**2).sum() for g in grads)).clamp(min=1e-12)
          for grad in grads:
            grad.mul_(min(1.0, optim.max_grad_norm / norm.item()))
          adam.step()
    return {name: np.mean(found) for name, found in losses.items() if found}


SLOW = ("rloo", "blank", "at least 3 tokens")


@pytest.mark.parametrize(
  "name",
  [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SETTINGS],
)
def test_a_step_equals_torch(name, files, tmp_path):
  config = files.config(**COMMON, **SETTINGS[name])
  if config.ppo.sft_weight:
    config.ppo.sft_data = f"{files.directory}/answered.json"
  run = tiny_ppo.make_run(files, config, str(tmp_path), with_other=True)
  seen = []
  with run.train.batches() as batches:
    rows = next(batches)
  del rows["skipped"]
  show = lambda *found: seen.append(found)  # noqa: E731
  with pretraining.opened(config, run.held.mesh, run.mixed, {}) as mixed:
    step = learn.make_train_step(run.held, run.train, run.records, show, mixed)
    state, metrics, _ = step(run.state, hosts.to_device(run.held.mesh, rows), {})
  rollout = seen[0][1]
  plain = Torch(files, config, run, rollout)
  plain.observe()

  every = [answer for group in plain.answers for answer in group]
  lengths = jax.device_get(rollout.lengths)
  assert len(set(lengths.ravel())) > 1  # some end, some are cut
  np.testing.assert_allclose(rollout.scores.ravel(), [a.score for a in every], rtol=1e-4, atol=1e-4)
  for place, found in (("old", rollout.log_probabilities), ("reference", rollout.reference)):
    found = np.asarray(found)[np.arange(rollout.shape[1]) < lengths[..., None]]
    wanted = torch.cat([getattr(a, place) for a in every])
    np.testing.assert_allclose(found, wanted, atol=1e-4)
  wanted = np.mean([(a.old - a.reference).sum() for a in every])
  assert metrics["objective/kl"] == pytest.approx(wanted, rel=1e-4)
  assert metrics["val/sampler_gap"] < 1e-5
  assert metrics["policy/cut_probability"] < 1e-5  # nothing is cut off
  assert lengths.min() >= max(1, config.ppo.min_new_tokens)

  for key, wanted in plain.learn().items():
    assert metrics[key] == pytest.approx(wanted, rel=1e-4, abs=1e-5), key
  compare(run.model, trees.flatten(state.params), plain.actor.state_dict())
  if config.ppo.estimator == "gae":
    critic = trees.flatten(state.critic.params)
    kernel = critic.pop("score/kernel")
    assert parity.relative_error(kernel[:, 0], plain.kernel.detach()) < 1e-4
    compare(run.model, critic, plain.critic.state_dict())


def compare(model_config, found: dict, tensors: dict):
  """Parameters after the step, within 1e-4 of their norm."""
  wanted = parity.as_params(model_config, tensors)
  assert found.keys() <= wanted.keys()
  for path, leaf in found.items():
    assert parity.relative_error(leaf, wanted[path]) < 1e-4, path
