"""A step of PPO: a rollout, and the updates that learn from it."""

import collections
import dataclasses
import zlib
from collections.abc import Callable

import jax
import numpy as np

from vlalign_jax import out_of_memory
from vlalign_jax.input_pipeline import prompts
from vlalign_jax.input_pipeline.prepare import Prepared
from vlalign_jax.losses import kl, sums
from vlalign_jax.losses import ppo as losses
from vlalign_jax.losses.score_queue import ScoreQueue
from vlalign_jax.rollout import collect
from vlalign_jax.rollout.pretraining import Stream
from vlalign_jax.sharding import hosts
from vlalign_jax.steps import answer_rows as layout
from vlalign_jax.steps.ppo import GAE, State

# Of the updates of a step, these are reported as they were last, and the gap as it was at first:
# the actor has not moved then since it sampled.
LAST = ("learning_rate", "skipped_steps", "skipped_in_a_row", "loss_scale")
FIRST = ("val/sampler_gap",)


@dataclasses.dataclass
class Learner:
  """What a run carries from rollout to rollout beside its State; goes through JSON.

  Attributes:
    kl_coef: of the next rollout.
    queue: None: scores are not normalised.
  """

  kl_coef: float
  queue: ScoreQueue | None

  @classmethod
  def make(cls, settings, progress: dict):
    """At a run's start, or as `progress["ppo"]` of a checkpoint has it."""
    kept = progress.get("ppo", {})
    queue = None
    if settings.score_queue:
      queue = ScoreQueue(settings.score_queue, settings.score_scale, kept.get("scores", ()))
    return cls(kept.get("kl_coef", settings.kl_coef), queue)

  def progress(self) -> dict:
    """What `make` goes on from."""
    scores = [] if self.queue is None else self.queue.scores.tolist()
    return {"kl_coef": self.kl_coef, "scores": scores}


def make_train_step(
  roles: collect.Roles,
  prepared: Prepared,
  records,
  progress: dict,
  show: Callable = lambda step, rollout, numbers: None,
  mixed: Stream | None = None,
) -> Callable:
  """The function `(state, prompts) -> (state, metrics)` that the loop calls.

  Args:
    roles: of the run.
    prepared: the prompts of all steps.
    records: that `prepared` numbers.
    progress: of the run; its "ppo" is kept up to date, so that checkpoints hold it.
    show: called with the step from 1, its Rollout and the record of each row, before learning.
    mixed: the conversations that updates also learn from.
  """
  config, settings = roles.config, roles.config.ppo
  learner = Learner.make(settings, progress)

  def train_step(state: State, rows: dict):
    step = int(state.step)
    numbers = prompts.record_numbers(prepared.plan, step)
    of_rows = [None if number < 0 else records[number] for number in numbers]
    seed = int(np.random.default_rng([config.seed, step]).integers(2**31))
    order, streams = by_record(numbers)
    rollout = collect.collect(roles, state, rows, of_rows, streams, seed)
    show(step + 1, rollout, numbers)
    fields, found = _learn_from(roles, state, rollout, order, learner)
    rows = rollout.rows | fields
    learnt = order[rollout.valid[order].any(axis=1)]
    with_policy = step >= settings.critic_warmup
    state, logged = _update(
      roles, state, rows, learnt, learner.kl_coef, step, mixed if with_policy else None
    )
    found, logged = jax.device_get((found, logged))
    metrics = _summary(logged) | sums.quotients(found) | _spread(rollout)
    metrics["objective/kl_coef"] = learner.kl_coef
    if with_policy:  # before, it is at the reference
      learner.kl_coef = kl.next_coefficient(
        learner.kl_coef,
        float(hosts.of_first(metrics["objective/kl"])),
        int(found["objective/kl"][1]),
        target=settings.kl_target or None,
        horizon=settings.kl_horizon,
      )
    progress["ppo"] = learner.progress() | ({"sft": mixed.progress()} if mixed else {})
    return roles.program.finish(state), metrics

  return train_step


@out_of_memory.names(out_of_memory.VALUES)
def _learn_from(roles: collect.Roles, state: State, rollout: collect.Rollout, order, learner):
  normalised, values = rollout.scores, None
  if learner.queue is not None:
    ordered, there = normalised[order], rollout.lengths[order] > 0
    ordered[there] = learner.queue.normalise(ordered[there])
    normalised = np.empty_like(normalised)
    normalised[order] = ordered
  if roles.config.ppo.estimator == GAE:
    seen = {"same_tower": roles.same_tower_critic, "blank": roles.config.ppo.blank_images}
    rows = layout.batch_for_scorer(rollout.rows, **seen)
    critic = state.critic.params, roles.critic_frozen
    values = roles.program.values(critic, rows, rollout.shape)
  return roles.program.compute_advantages(
    rollout.scores,
    normalised,
    rollout.log_probabilities,
    rollout.reference,
    rollout.drawn,
    values,
    rollout.lengths,
    rollout.ended,
    np.float32(learner.kl_coef),
  )


def by_record(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """What makes a step the same whatever rows its records are in, which depends on the mesh.

  Args:
    numbers: int32[B], the record of each row, -1 where there is none.

  Returns:
    (int[B] the rows in the order of their records, those without one last; int32[B] a number of
    each row that no other row has and that says which record it is, and which time it comes).
  """
  order = np.argsort(np.where(numbers < 0, np.iinfo(np.int32).max, numbers), kind="stable")
  streams, times = np.zeros(len(numbers), np.int32), collections.Counter()
  for row in order:
    key = f"{numbers[row]} {times[numbers[row]]}"
    streams[row] = zlib.crc32(key.encode()) & 0x7FFFFFFF
    times[numbers[row]] += 1
  return order, streams


def mini_batches(learnt: np.ndarray, rows: int, count: int) -> list[np.ndarray]:
  """Deals rows out alike, whatever the others are: these only fill up, as shapes are fixed.

  Args:
    learnt: int[R], rows that have something to learn from, in the order in which they come.
    rows: B, of the rollout; a multiple of `count`.
    count: mini-batches.

  Returns:
    int32[B / count] rows of each mini-batch; those that would only be filled are left out.
  """
  fill = np.setdiff1d(np.arange(rows), learnt)
  found = []
  for part in np.array_split(learnt, count):
    missing = rows // count - len(part)
    if len(part):
      found.append(np.concatenate([part, fill[:missing]]).astype(np.int32))
      fill = fill[missing:]
  return found


def _update(
  roles: collect.Roles,
  state: State,
  rows: dict,
  learnt: np.ndarray,
  kl_coef: float,
  step: int,
  mixed: Stream | None,
):
  """(state after all updates of a rollout, list of what is reported of them).

  Args:
    roles, state: of the run.
    rows: of the rollout, with `compute_advantages`'s fields.
    learnt: int[R], rows with an answer that counts, in the order of their records.
    kl_coef: of the rollout.
    step: rollouts before this one.
    mixed: what the actor also learns from, if it does.
  """
  config, settings, logged = roles.config, roles.config.ppo, []
  with_policy = step >= settings.critic_warmup
  for epoch in range(settings.num_ppo_epochs):
    shuffled = np.random.default_rng([config.seed, step, epoch]).permutation(learnt)
    parts = mini_batches(shuffled, len(rows["tokens"]), settings.num_mini_batches)
    for index in parts:
      state, found = roles.program.update_step(
        state,
        {part: tree for part, tree in roles.frozen.items() if part != "reference"},
        roles.critic_frozen,
        rows,
        index,
        np.float32(kl_coef),
        mixed.take() if mixed else None,
        with_policy=with_policy,
        same_tower=roles.same_tower_critic,
      )
      logged.append(found)
    if settings.stop_kl and with_policy and parts:
      name = "policy/approxkl_avg"
      newest = jax.device_get([{name: found[name]} for found in logged[-len(parts) :]])
      if hosts.of_first(sums.quotients(sums.total(newest))[name]) > settings.stop_kl:
        break
  return state, logged


def _summary(logged: list[dict]) -> dict:
  """One value of each metric of the updates of a step; what is a mean is one over all of them."""
  if not logged:
    return {"skipped_in_a_row": 0, "val/updates": 0}
  pairs = [name for name, value in logged[0].items() if isinstance(value, tuple)]
  found = sums.quotients(sums.total({name: one[name] for name in pairs} for one in logged))
  found = losses.summary(found)
  for name, first in logged[0].items():
    if name not in found:
      found[name] = np.mean([one[name] for one in logged], dtype=np.float64)
    if name.removeprefix("critic/") in LAST:
      found[name] = logged[-1][name]
    if name in FIRST:
      found[name] = sums.quotients({name: first})[name]
  if "loss" not in found:  # only the critic has learnt
    found |= {
      name.removeprefix("critic/"): value
      for name, value in found.items()
      if name.startswith("critic/")
    }
  worst = max(found["skipped_in_a_row"], found.get("critic/skipped_in_a_row", 0))
  found.pop("critic/skipped_in_a_row", None)
  return found | {"skipped_in_a_row": worst, "val/updates": len(logged)}


def _spread(rollout: collect.Rollout) -> dict:
  """The standard deviation of the scores as they were given."""
  scores = rollout.scores[rollout.valid].astype(np.float64)
  return {"objective/scores_std": scores.std()} if len(scores) else {}
