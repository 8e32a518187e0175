"""Learning-rate schedules against transformers' `get_scheduler`, step by step."""

import jax
import numpy as np
import pytest
import torch
import transformers

from vlalign_jax import config, stages
from vlalign_jax.optim import schedules

PEAK = 1e-3


def ours(total: int, peak: float = PEAK, **keys) -> np.ndarray:
  """Returns the learning rates of all updates, and the one after the last."""
  optim = stages.defaults("sft").optim
  optim.update(keys)
  schedule = schedules.make_schedule(optim, peak, total)
  return np.asarray(jax.jit(jax.vmap(schedule))(np.arange(total + 1)))


def theirs(name: str, total: int, warmup: int, **keys) -> np.ndarray:
  parameter = torch.nn.Parameter(torch.zeros(1))
  sgd = torch.optim.SGD([parameter], lr=PEAK)
  scheduler = transformers.get_scheduler(
    name, sgd, warmup, total, scheduler_specific_kwargs=keys or None
  )
  rates = []
  for _ in range(total + 1):
    rates.append(scheduler.get_last_lr()[0])
    sgd.step()
    scheduler.step()
  return np.array(rates)


@pytest.mark.parametrize(("total", "warmup"), [(30, 5), (50, 0), (50, 3), (101, 3), (3, 2), (1, 0)])
@pytest.mark.parametrize(
  ("name", "key", "their_key", "value"),
  [
    ("linear", None, None, None),
    ("cosine", None, None, None),
    ("cosine_with_restarts", "cycles", "num_cycles", 1),
    ("cosine_with_restarts", "cycles", "num_cycles", 5),
    ("polynomial", "power", "power", 1.0),
    ("polynomial", "power", "power", 2.5),
    ("constant", None, None, None),
    ("constant_with_warmup", None, None, None),
  ],
)
def test_every_step_equals_transformers(name, key, their_key, value, total, warmup):
  expected = theirs(name, total, warmup, **({their_key: value} if key else {}))
  keys = {"warmup_steps": warmup, "warmup_ratio": 0.0} | ({key: value} if key else {})
  rates = ours(total, schedule=name, **keys)
  np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-6 * PEAK)


def test_restarts_begin_at_the_peak():
  # 5 * (10 / 50) may come out a little below 1 in float32, where the rate would be 0.
  rates = ours(50, schedule="cosine_with_restarts", warmup_ratio=0.0, cycles=5)
  np.testing.assert_allclose(rates[:50:10], PEAK, rtol=1e-6)
  assert rates[50] == 0


@pytest.mark.parametrize(
  ("warmup_ratio", "warmup_steps", "total", "expected"),
  [
    (0.03, 0, 1000, 30),
    (0.03, 0, 10, 1),
    (0.0, 0, 10, 0),
    (1.0, 0, 10, 10),
    (0.03, 1, 10, 1),
    (0.5, 2, 10, 2),
    (0.0, 500, 10, 500),
  ],
)
def test_warmup_is_a_ratio_or_steps(warmup_ratio, warmup_steps, total, expected):
  optim = stages.defaults("sft").optim
  optim.update(warmup_ratio=warmup_ratio, warmup_steps=warmup_steps)
  assert schedules.warmup_steps(optim, total) == expected


@pytest.mark.parametrize("name", config.SCHEDULES)
def test_a_rate_of_zero_stays_zero(name):
  np.testing.assert_array_equal(ours(10, peak=0.0, schedule=name, warmup_steps=2), 0)
