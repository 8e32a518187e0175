"""Evaluation of PPO on held-out prompts: the scores of answers, and the KL to the reference."""

import zlib
from collections.abc import Callable

import numpy as np

from vlalign_jax.input_pipeline import prompts
from vlalign_jax.input_pipeline.prepare import Prepared
from vlalign_jax.rollout import collect
from vlalign_jax.sharding import hosts
from vlalign_jax.training import evaluation, start


def make_evaluate(roles: collect.Roles, prepared: Prepared | None, records) -> Callable | None:
  """Reads all records once, and returns the function of a state that the loop calls.

  Answers are sampled as in training, with the same random numbers each time, so that evaluations
  differ only by the policy. Metrics mean what they mean in `losses.ppo.objective`.

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
      for step, batch in enumerate(batches):
        numbers = prompts.record_numbers(prepared.plan, step)
        row_records = [None if number < 0 else records[number] for number in numbers]
        batch = hosts.to_device(
          roles.mesh, {name: x for name, x in batch.items() if name != "skipped"}
        )
        rollout = collect.collect(
          roles, state, batch, row_records, streams[np.maximum(numbers, 0)], config.seed
        )
        divergence = collect.divergence(rollout, config.ppo.kl_estimator)
        valid = rollout.valid
        scores += rollout.scores[valid].tolist()
        divergences += divergence[valid].tolist()
        ended += rollout.ended[valid].tolist()
        tokens += rollout.lengths[valid].tolist()
    score, mean_kl = float(np.mean(scores)), float(np.mean(divergences))
    return {
      "objective/scores": score,
      "objective/scores_std": float(np.std(scores)),
      "objective/kl": mean_kl,
      "objective/rlhf_reward": score - config.ppo.kl_coef * mean_kl,
      "answers": len(scores),
      "answer_tokens": float(np.mean(tokens)),
      "ended": float(np.mean(ended)),
      "bad_records": bad,
    }

  return evaluate
