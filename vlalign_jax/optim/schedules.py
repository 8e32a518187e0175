"""Learning-rate schedules, as defined by transformers' `get_scheduler`."""

import math

import jax.numpy as jnp
import optax


def warmup_steps(optim, total_steps: int) -> int:
  """Returns the number of warm-up steps: `optim.warmup_steps`, or `optim.warmup_ratio` of all."""
  return optim.warmup_steps or math.ceil(optim.warmup_ratio * total_steps)


def make_schedule(optim, peak: float, total_steps: int) -> optax.Schedule:
  """Makes a schedule.

  Args:
    optim: the config's `optim` group: schedule, warmup_ratio, warmup_steps, cycles, power.
    peak: the learning rate after warm-up.
    total_steps: number of updates.

  Returns:
    Function from the index of an update, int32[] from 0, to its learning rate, float32[]. All
    schedules but `constant` rise linearly from 0 during warm-up. Then `linear` falls to 0,
    `polynomial` to 1e-7, `cosine` along half a wave, and `cosine_with_restarts` so `cycles` times.
  """
  warmup = 0 if optim.schedule == "constant" else warmup_steps(optim, total_steps)
  decay_steps = max(1, total_steps - warmup)
  final = min(1e-7, peak)

  def after_warmup(elapsed):
    done = elapsed / decay_steps
    if optim.schedule == "linear":
      return peak * (1 - done)
    if optim.schedule == "polynomial":
      return (peak - final) * (1 - done) ** optim.power + final
    if optim.schedule == "cosine":
      return peak * 0.5 * (1 + jnp.cos(jnp.pi * done))
    if optim.schedule == "cosine_with_restarts":
      # The remainder of integers is exact; that of a rounded fraction may be off by a cycle.
      phase = elapsed * optim.cycles % decay_steps / decay_steps
      return peak * jnp.where(elapsed < decay_steps, 0.5 * (1 + jnp.cos(jnp.pi * phase)), 0.0)
    return jnp.full_like(done, peak)

  def schedule(count):
    count = jnp.asarray(count, jnp.float32)
    rising = peak * count / max(1, warmup)
    elapsed = jnp.clip(count - warmup, 0, decay_steps)
    return jnp.where(count < warmup, rising, after_warmup(elapsed))

  return schedule
