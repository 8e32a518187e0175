"""Sample answers of rollouts with their pictures and scores, in RUN_DIR/rollouts.jsonl."""

import json
import math
import os
from collections.abc import Callable

import jax
from etils import epath

from vlalign_jax import storage
from vlalign_jax.rollout import collect
from vlalign_jax.training import run_directory

FILE = "rollouts.jsonl"


def make_show(workdir: str, settings, tokenizer, records, first: int) -> Callable:
  """The function `(step, rollout, numbers)` that writes the first answers of every few rollouts.

  A line is one answer: step, record, id, images, prompt, sample, answer, tokens, ended, score (null
  if it is not finite) and kl (k1, summed over the answer).

  Args:
    workdir: the run directory.
    settings: the config's `ppo` group.
    tokenizer: the actor's.
    records: that `numbers` count.
    first: the step that the run goes on from; later lines go.
  """
  path = os.path.join(workdir, FILE)
  kept = run_directory.metrics_until(epath.Path(path), first)
  every = settings.log_samples_every
  if kept or every:
    storage.write(path, kept)

  def show(step: int, rollout: collect.Rollout, numbers) -> None:
    nonlocal kept
    if not every or (step - 1) % every:
      return
    lengths, ended = jax.device_get((rollout.lengths, rollout.ended))
    kl, texts = collect.divergence(rollout), rollout.texts(tokenizer)
    places = [(b, n) for b, of_row in enumerate(lengths) for n, m in enumerate(of_row) if m]
    for b, n in places[: settings.log_samples]:
      record, score = records[numbers[b]], float(rollout.scores[b, n])
      line = {
        "step": step,
        "record": int(numbers[b]),
        "id": record.id,
        "images": list(record.images),
        "prompt": record.turns[-1].human,
        "sample": n,
        "answer": texts[b][n],
        "tokens": int(lengths[b, n]),
        "ended": bool(ended[b, n]),
        "score": score if math.isfinite(score) else None,
        "kl": float(kl[b, n]),
      }
      kept += json.dumps(line) + "\n"
    storage.write(path, kept)

  return show
