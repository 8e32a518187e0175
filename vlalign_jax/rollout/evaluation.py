"""Held-out prompts: what the actor's answers score, and how far it is from the reference."""

import zlib
from collections.abc import Callable

import numpy as np

from vlalign_jax.input_pipeline import prompts
from vlalign_jax.input_pipeline.prepare import Prepared
from vlalign_jax.rollout import collect
from vlalign_jax.sharding import hosts
from vlalign_jax.training import evaluation, start


def make_evaluate(roles: collect.Roles, prepared: Prepared | None, records) -> Callable | None:
  """The function of a state that the loop calls, after reading all records once.

  Answers are sampled as in training, with the same random numbers each time, so that evaluations
  differ by what was learnt. What `losses.ppo.objective` names is the same quantity here.

  Args:
    roles: of the run.
    prepared: the held-out prompts; None: there are none.
    records: that `prepared` numbers.

  Returns:
    `state -> dict of floats`, or None without prompts.

  Raises:
    InputError: too many records cannot be read.
  """
  if prepared is None:
    return None
  config = roles.config
  share = start.my_share(roles.mesh)
  bad = evaluation.read_all(config, roles.mesh, prepared, share)
  names = [f"{number} {record.id}" for number, record in enumerate(records)]
  streams = np.array([zlib.crc32(name.encode()) & 0x7FFFFFFF for name in names])

  def evaluate(state) -> dict[str, float]:
    scores, divergences, ended, tokens = [], [], [], []
    with prepared.batches(workers=0, **share) as batches:
      for step, rows in enumerate(batches):
        numbers = prompts.record_numbers(prepared.plan, step)
        of_rows = [None if number < 0 else records[number] for number in numbers]
        rows = hosts.to_device(roles.mesh, {n: x for n, x in rows.items() if n != "skipped"})
        rollout = collect.collect(
          roles, state, rows, of_rows, streams[np.maximum(numbers, 0)], config.seed
        )
        found = collect.divergence(rollout, config.ppo.kl_estimator)
        valid = rollout.valid
        scores += rollout.scores[valid].tolist()
        divergences += found[valid].tolist()
        ended += rollout.ended[valid].tolist()
        tokens += rollout.lengths[valid].tolist()
    score, divergence = float(np.mean(scores)), float(np.mean(divergences))
    return {
      "objective/scores": score,
      "objective/scores_std": float(np.std(scores)),
      "objective/kl": divergence,
      "objective/rlhf_reward": score - config.ppo.kl_coef * divergence,
      "answers": len(scores),
      "answer_tokens": float(np.mean(tokens)),
      "ended": float(np.mean(ended)),
      "bad_records": bad,
    }

  return evaluate
