"""Checks before training that a run's updates can change its weights."""

import numpy as np
from absl import logging

from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.optim import optimizer, schedules

# A run of fewer updates is probably a mistake.
FEW = 10


def check(config, params, updates: int, name: str = "this run") -> None:
  """Refuses a run that would not change its weights, and warns if it may hardly change them.

  Args:
    config: its `optim` group, and batch_size for the message.
    params: nested dict of the trained parameters, arrays or shapes.
    updates: number of updates of the run.
    name: of the run, for messages.

  Raises:
    InputError: no update has a learning rate above 0 for any trained parameter.
  """
  optim = config.optim
  rates = optimizer.learning_rates(optim, updates)
  groups = {optimizer.rate_group(path, rates) for path in trees.flatten(params)}
  counts = np.arange(updates)
  highest = max((float(np.max(rates[group](counts))) for group in groups), default=0.0)
  rising = optim.schedule != "constant"
  warmup = min(schedules.warmup_steps(optim, updates), updates) if rising else 0
  more = (
    "give more records, raise num_train_epochs or max_steps, or lower batch_size "
    f"({config.batch_size})"
  )
  if highest <= 0:
    if not any(float(np.max(rates[group](np.array([warmup])))) > 0 for group in groups):
      change = "set a learning rate of a trained part above 0"
    else:
      change = f"set {_warmup_key(optim)}=0, or {more}"
    raise InputError(
      f"{name} has {_count(updates)}, all with learning rate 0, {warmup} of them in the warm-up "
      f"from 0 ({_warmup(optim)}): its weights would not change; {change}"
    )
  if updates < FEW:
    logging.warning("%s has only %s: it may learn little; %s", name, _count(updates), more)
  if warmup > updates / 2:
    logging.warning(
      "warm-up takes %d of the %s of %s (%s): most of them have a low learning rate; "
      "lower it, or %s",
      warmup,
      _count(updates),
      name,
      _warmup(optim),
      more,
    )


def _warmup_key(optim) -> str:
  """Returns the config key that sets the length of the warm-up."""
  return "optim.warmup_steps" if optim.warmup_steps else "optim.warmup_ratio"


def _warmup(optim) -> str:
  return f"{_warmup_key(optim)}={optim.warmup_steps or optim.warmup_ratio}"


def _count(updates: int) -> str:
  return f"{updates} update{'s' * (updates != 1)}"
