"""The losses and metrics of DPO, against TRL's DPOTrainer and torch in float64."""

import itertools

import jax
import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from tests.losses import trl_losses
from vlalign_jax.errors import InputError
from vlalign_jax.losses import dpo

N, T, BETA = 6, 9, 0.3
ANSWERS = [2, 4, 3, 1, 0, 5]
K = max(ANSWERS)


def make_pairs(seed: int = 0):
  """Returns tokens' log-probabilities and answers' mask, both [2, N, T], and reference [2, N]."""
  rng = np.random.default_rng(seed)
  mask = np.arange(T) < rng.integers(1, T + 1, (2, N, 1))
  token_logps = -rng.exponential(2.0, (2, N, T)).astype(np.float32)
  reference = (token_logps * mask).sum(-1) + rng.normal(size=(2, N)) * 2
  return token_logps, mask, reference.astype(np.float32)


def padded(x, fill=np.nan):
  """Pads pairs [2, N] to lists [N + 1, K]; the last example is for one answer."""
  full = np.full((N + 1, K), fill, np.float32)
  full[:N, :2] = x.T
  return full


def arguments(token_logps, mask, reference):
  """Returns the arguments of `dpo.loss` for these pairs."""
  logps = padded((token_logps * mask).sum(-1))
  valid = ~np.isnan(logps)
  valid[N, 0], logps[N, 0] = True, -3.0
  return logps, padded(reference), padded(mask.sum(-1), 0), valid


def make_rankings(seed: int = 0, scale: float = 1.0):
  """Returns arguments of `dpo.loss` for examples with ANSWERS answers."""
  rng = np.random.default_rng(seed)
  valid = np.arange(K) < np.array(ANSWERS)[:, None]
  lengths = rng.integers(1, 20, valid.shape)
  reference = -rng.exponential(2.0, valid.shape) * lengths
  logps = reference + scale * rng.normal(size=valid.shape)
  logps, reference = (np.where(valid, x, np.nan).astype(np.float32) for x in (logps, reference))
  return logps, reference, lengths, valid


@pytest.mark.parametrize(
  ("kind", "label_smoothing"),
  [("sigmoid", 0.0), ("hinge", 0.0), ("ipo", 0.0), ("robust", 0.0), ("robust", 0.2)],
)
@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
def test_losses_and_metrics_of_pairs_equal_trl(kind, label_smoothing, sft_weight):
  pairs = make_pairs()
  kinds, weights = ([kind, "sft"], [1.0, sft_weight]) if sft_weight else ([kind], [1.0])
  expected, expected_metrics = trl_losses.dpo(
    *pairs, kinds=kinds, weights=weights, beta=BETA, label_smoothing=label_smoothing
  )
  inputs = arguments(*pairs)
  total, count = dpo.loss(
    *inputs, kind=kind, beta=BETA, label_smoothing=label_smoothing, sft_weight=sft_weight
  )
  assert count == N
  assert total / count == pytest.approx(expected, rel=1e-5)
  metrics = {key: s / c for key, (s, c) in dpo.metrics(*inputs, beta=BETA).items()}
  compared = [key for key in expected_metrics if key.startswith(("rewards/", "logps/"))]
  assert len(compared) == 6
  assert {key: metrics[key] for key in compared} == pytest.approx(
    {key: expected_metrics[key] for key in compared}, rel=1e-5
  )


def test_label_smoothing_is_conservative_dpo():
  """TRL 0.24 has it in `sigmoid`; 1.16 in `aot`, which for a single pair is the same formula."""
  pairs = make_pairs(1)
  each = [
    trl_losses.dpo(
      *(x[:, n : n + 1] for x in pairs),
      kinds=["aot"],
      weights=[1.0],
      beta=BETA,
      label_smoothing=0.1,
    )[0]
    for n in range(N)
  ]
  token_logps, mask, reference = pairs
  delta = torch.tensor((token_logps * mask).sum(-1) - reference, dtype=torch.float64)
  delta = BETA * (delta[0] - delta[1])
  formula = -logsigmoid(delta) * (1 - 0.1) - logsigmoid(-delta) * 0.1
  assert each == pytest.approx(formula.tolist(), rel=1e-5)
  total, count = dpo.loss(*arguments(*pairs), beta=BETA, label_smoothing=0.1)
  assert total / count == pytest.approx(np.mean(each), rel=1e-5)


def ranking_loss(rewards):
  """Returns Plackett-Luce's negative log-likelihood of one example's float64 rewards."""
  terms = [torch.logsumexp(rewards[i:], 0) - rewards[i] for i in range(len(rewards))]
  return sum(terms)


def loss_of_one(logps, reference, lengths, kind, label_smoothing):
  """Returns the loss of one example of several answers, in float64."""
  ratios = logps - reference
  pairs = list(itertools.combinations(range(len(logps)), 2))
  if kind == "hinge":
    return sum(torch.relu(1 - BETA * (ratios[i] - ratios[j])) for i, j in pairs) / len(pairs)
  if kind == "ipo":
    means = ratios / lengths
    return sum((means[i] - means[j] - 1 / (2 * BETA)) ** 2 for i, j in pairs) / len(pairs)
  sign = {"sigmoid": 1, "robust": -1}[kind]
  forward, backward = ranking_loss(BETA * ratios), ranking_loss(BETA * ratios.flip(0))
  loss = (1 - label_smoothing) * forward + sign * label_smoothing * backward
  return loss / (1 - 2 * label_smoothing) if kind == "robust" else loss


@pytest.mark.parametrize(
  ("kind", "label_smoothing"),
  [("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.2), ("hinge", 0.0), ("ipo", 0.0)],
)
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_rankings_and_their_gradients_equal_float64(kind, label_smoothing, scale):
  logps, reference, lengths, valid = make_rankings(scale=scale)
  variable = torch.tensor(np.where(valid, logps, 0).astype(np.float64), requires_grad=True)
  expected = sum(
    loss_of_one(
      variable[n, :k],
      torch.tensor(reference[n, :k].astype(np.float64)),
      torch.tensor(lengths[n, :k]),
      kind,
      label_smoothing,
    )
    for n, k in enumerate(ANSWERS)
    if k > 1
  )
  expected.backward()

  @jax.jit
  def compute(x):
    return dpo.loss(
      x, reference, lengths, valid, kind=kind, beta=BETA, label_smoothing=label_smoothing
    )

  (total, count), gradient = jax.value_and_grad(compute, has_aux=True)(logps)
  assert count == sum(k > 1 for k in ANSWERS)
  assert total == pytest.approx(expected.item(), rel=1e-5)
  difference = np.linalg.norm(gradient - variable.grad.numpy())
  assert difference <= 1e-5 * np.linalg.norm(variable.grad)
  assert not gradient[~valid].any()


def test_micro_batches_add_up_to_the_batch():
  inputs = make_rankings()
  batch_loss, count = dpo.loss(*inputs, sft_weight=0.5)
  _, _, lengths, valid = inputs
  chosen_length = lengths[valid.sum(1) > 1, 0].mean()
  parts = [
    dpo.loss(*(x[part] for x in inputs), sft_weight=0.5, chosen_length=chosen_length)
    for part in (slice(0, 2), slice(2, None))
  ]
  assert [c for _, c in parts] == [2, 2]
  assert sum(t for t, _ in parts) == pytest.approx(float(batch_loss), rel=1e-6)
  assert sum(c for _, c in parts) == count


def test_metrics_of_rankings():
  logps, reference, lengths, valid = make_rankings(1, 5.0)
  metrics = {
    key: (float(s), float(c))
    for key, (s, c) in dpo.metrics(logps, reference, lengths, valid, beta=BETA).items()
  }
  logps, reference = logps.astype(np.float64), reference.astype(np.float64)
  rewards = BETA * (logps - reference)
  ranked = [n for n, k in enumerate(ANSWERS) if k > 1]
  pairs = [(n, i, j) for n in ranked for i, j in itertools.combinations(range(ANSWERS[n]), 2)]

  def close(total, count):
    return pytest.approx((total, count), rel=1e-5)

  def chosen(x):
    return sum(x[n, 0] for n in ranked)

  def rejected(x):
    return sum(x[n, 1 : ANSWERS[n]].mean() for n in ranked)

  def right(x):
    return sum(x[n, i] > x[n, j] for n, i, j in pairs)

  tokens = sum(lengths[n, 0] for n in ranked)
  expected = {
    "rewards/chosen": close(chosen(rewards), len(ranked)),
    "rewards/rejected": close(rejected(rewards), len(ranked)),
    "rewards/margins": close(chosen(rewards) - rejected(rewards), len(ranked)),
    "rewards/accuracies": (right(rewards), len(pairs)),
    "logps/chosen": close(chosen(logps), len(ranked)),
    "logps/rejected": close(rejected(logps), len(ranked)),
    "logps/accuracies": (right(logps), len(pairs)),
    "logps/accuracies_per_token": (right(logps / lengths), len(pairs)),
    "logps/reference_accuracies": (right(reference), len(pairs)),
    "nll_loss": close(-chosen(logps), tokens),
  }
  assert metrics == expected
  accuracies = [metrics[key][0] for key in metrics if "accuracies" in key]
  assert len(set(accuracies)) == 4  # otherwise the test would not notice if two were exchanged


def test_nothing_to_compare_is_zero():
  logps, reference, lengths, valid = make_rankings()
  for kind in dpo.KINDS:
    loss = dpo.loss(logps, reference, lengths, np.zeros_like(valid), kind=kind, sft_weight=1.0)
    assert loss == (0, 0)
  metrics = dpo.metrics(logps, reference, lengths, np.zeros_like(valid))
  assert all((total, count) == (0, 0) for total, count in metrics.values())


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"kind": "sigmoidal"}, "dpo.loss='sigmoidal': choose one of sigmoid"),
    ({"beta": 0.0}, "dpo.beta=0.0"),
    ({"beta": float("nan")}, "dpo.beta=nan"),
    ({"label_smoothing": 0.5}, "dpo.label_smoothing=0.5"),
    ({"kind": "ipo", "label_smoothing": 0.1}, "dpo.loss='ipo' does not use it"),
    ({"sft_weight": -1.0}, "dpo.sft_weight=-1.0"),
  ],
)
def test_settings_out_of_range_are_refused(settings, message):
  with pytest.raises(InputError, match=message):
    dpo.loss(*make_rankings(), **settings)
