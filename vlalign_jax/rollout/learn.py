"""A step of PPO: a rollout, and the updates that learn from it."""

import collections
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
from vlalign_jax.steps.ppo import GAE, PPOState

# Of the updates of a step, these metrics are reported from the last one, and the gap from the first
# one: the actor has not changed by then since it sampled.
LAST = ("learning_rate", "skipped_steps", "skipped_in_a_row", "loss_scale")
FIRST = ("val/sampler_gap",)


def make_train_step(
  roles: collect.Roles,
  prepared: Prepared,
  records,
  show: Callable = lambda step, rollout, numbers: None,
  conversations: Stream | None = None,
) -> Callable:
  """Returns the function `(state, prompts, carried) -> (state, metrics, carried)` of the loop.

  `carried` has what a run takes along on the host, and goes through JSON: `kl_coef` of the next
  rollout, `scores` of the queue that normalizes new ones, and `sft`, the place among the
  conversations. It is empty at the start.

  Args:
    roles: of the run.
    prepared: the prompts of all steps.
    records: that `prepared` numbers.
    show: called with the step from 1, its Rollout and the record of each row, before learning.
    conversations: that updates also learn from.
  """
  config, settings = roles.config, roles.config.ppo

  def train_step(state: PPOState, prompt_batch: dict, carried: dict):
    step = int(state.step)
    numbers = prompts.record_numbers(prepared.plan, step)
    row_records = [None if number < 0 else records[number] for number in numbers]
    seed = int(np.random.default_rng([config.seed, step]).integers(2**31))
    order, streams = by_record(numbers)
    rollout = collect.collect(roles, state, prompt_batch, row_records, streams, seed)
    show(step + 1, rollout, numbers)
    kl_coef = carried.get("kl_coef", settings.kl_coef)
    scores, queue = _normalize(settings, rollout, order, carried.get("scores", ()))
    fields, reported = _compute_advantages(roles, state, rollout, scores, kl_coef)
    learned = order[rollout.valid[order].any(axis=1)]
    with_policy = step >= settings.critic_warmup
    stream = conversations if with_policy else None
    state, logged = _update(roles, state, rollout.batch | fields, learned, kl_coef, step, stream)
    reported, logged = jax.device_get((reported, logged))
    metrics = _summary(logged) | sums.quotients(reported) | _spread(rollout)
    metrics["objective/kl_coef"] = kl_coef
    if with_policy:  # before, the policy is its reference
      kl_coef = kl.next_coefficient(
        kl_coef,
        float(hosts.of_first(metrics["objective/kl"])),
        int(reported["objective/kl"][1]),
        target=settings.kl_target or None,
        horizon=settings.kl_horizon,
      )
    carried = {"kl_coef": kl_coef, "scores": queue}
    if conversations is not None:
      carried["sft"] = conversations.progress()
    return roles.program.finish(state), metrics, carried

  return train_step


def _normalize(settings, rollout: collect.Rollout, order, scores) -> tuple[np.ndarray, list]:
  """Returns a rollout's scores relative to those of the last ones, and the queue of these.

  Without `ppo.score_queue` scores stay as they are and the queue is empty.
  """
  if not settings.score_queue:
    return rollout.scores, []
  queue = ScoreQueue(settings.score_queue, settings.score_scale, scores)
  ordered, has_answer = rollout.scores[order], rollout.lengths[order] > 0
  ordered[has_answer] = queue.normalize(ordered[has_answer])
  normalized = np.empty_like(ordered)
  normalized[order] = ordered
  return normalized, queue.scores.tolist()


@out_of_memory.names(out_of_memory.VALUES)
def _compute_advantages(
  roles: collect.Roles, state: PPOState, rollout: collect.Rollout, scores: np.ndarray, kl_coef
):
  values = None
  if roles.config.ppo.estimator == GAE:
    seen = {"same_tower": roles.same_tower_critic, "blank": roles.config.ppo.blank_images}
    batch = layout.batch_for_scorer(rollout.batch, **seen)
    critic = state.critic.params, roles.critic_frozen
    values = roles.program.values(critic, batch, rollout.shape)
  return roles.program.compute_advantages(
    rollout.scores,
    scores,
    rollout.log_probabilities,
    rollout.reference,
    rollout.drawn,
    values,
    rollout.lengths,
    rollout.ended,
    np.float32(kl_coef),
  )


def by_record(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Orders rows by their records, so that a step does not depend on the mesh, which places rows.

  Args:
    numbers: int32[B], the record of each row, -1 where there is none.

  Returns:
    (int[B] the rows in the order of their records, those without one last; int32[B] a number for
    each row, made from its record and how often that has come, which chooses its random numbers).
  """
  order = np.argsort(np.where(numbers < 0, np.iinfo(np.int32).max, numbers), kind="stable")
  streams, times = np.zeros(len(numbers), np.int32), collections.Counter()
  for row in order:
    key = f"{numbers[row]} {times[numbers[row]]}"
    streams[row] = zlib.crc32(key.encode()) & 0x7FFFFFFF
    times[numbers[row]] += 1
  return order, streams


def mini_batches(learned: np.ndarray, rows: int, count: int) -> list[np.ndarray]:
  """Splits the rows of a rollout into mini-batches of one size.

  Rows without anything to learn from only fill mini-batches up, as shapes are fixed.

  Args:
    learned: int[R], rows that have something to learn from, in the order in which they come.
    rows: B, of the rollout; a multiple of `count`.
    count: mini-batches.

  Returns:
    int32[B / count] rows of each mini-batch; mini-batches of nothing else are left out.
  """
  fill = np.setdiff1d(np.arange(rows), learned)
  batches = []
  for part in np.array_split(learned, count):
    missing = rows // count - len(part)
    if len(part):
      batches.append(np.concatenate([part, fill[:missing]]).astype(np.int32))
      fill = fill[missing:]
  return batches


def _update(
  roles: collect.Roles,
  state: PPOState,
  batch: dict,
  learned: np.ndarray,
  kl_coef: float,
  step: int,
  conversations: Stream | None,
):
  """Returns the state after all updates of a rollout, and a list of what they report.

  Args:
    roles, state: of the run.
    batch: of the rollout, with the fields of `compute_advantages`.
    learned: int[R], rows with an answer that counts, in the order of their records.
    kl_coef: of the rollout.
    step: rollouts before this one.
    conversations: that the actor also learns from.
  """
  config, settings, logged = roles.config, roles.config.ppo, []
  with_policy = step >= settings.critic_warmup
  for epoch in range(settings.num_ppo_epochs):
    shuffled = np.random.default_rng([config.seed, step, epoch]).permutation(learned)
    parts = mini_batches(shuffled, len(batch["tokens"]), settings.num_mini_batches)
    for index in parts:
      state, reported = roles.program.update_step(
        state,
        roles.frozen,
        roles.critic_frozen,
        batch,
        index,
        np.float32(kl_coef),
        conversations.take() if conversations else None,
        with_policy=with_policy,
        same_tower=roles.same_tower_critic,
      )
      logged.append(reported)
    if settings.stop_kl and with_policy and parts:
      name = "policy/approxkl_avg"
      newest = jax.device_get([{name: one[name]} for one in logged[-len(parts) :]])
      if hosts.of_first(sums.quotients(sums.total(newest))[name]) > settings.stop_kl:
        break
  return state, logged


def _summary(logged: list[dict]) -> dict:
  """Returns each metric of a step from those of its updates; means are over all updates."""
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
  if "loss" not in found:  # only the critic has learned
    found |= {
      name.removeprefix("critic/"): value
      for name, value in found.items()
      if name.startswith("critic/")
    }
  worst = max(found["skipped_in_a_row"], found.get("critic/skipped_in_a_row", 0))
  found.pop("critic/skipped_in_a_row", None)
  return found | {"skipped_in_a_row": worst, "val/updates": len(logged)}


def _spread(rollout: collect.Rollout) -> dict:
  """Returns the standard deviation of the scores before any shaping."""
  scores = rollout.scores[rollout.valid].astype(np.float64)
  return {"objective/scores_std": scores.std()} if len(scores) else {}
