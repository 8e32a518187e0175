"""Sample answers of rollouts with their pictures and scores: rollouts.jsonl and rollouts.html."""

import collections
import itertools
import json
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath

from vlalign_jax import html, storage
from vlalign_jax.prediction import directory, gallery, tables
from vlalign_jax.prediction import records as data
from vlalign_jax.rollout import collect
from vlalign_jax.runs import run_directory
from vlalign_jax.writers.writer import Writer

FILE, PAGE = "rollouts.jsonl", "rollouts.html"
# Rollouts on the page, the newest ones: it has the pictures inside.
ON_PAGE = 10
_VALUES = ("score", "kl", "tokens")


def make_show(
  workdir: str, config, tokenizer, records, first: int, writers: Sequence[Writer] = ()
) -> Callable:
  """Returns the function `(step, rollout, numbers)` that writes answers of every few rollouts.

  A line is one answer: step, record, id, images, prompt, maybe history and reference, sample,
  answer, tokens, ended, score (null if it is not finite) and kl (k1, summed over the answer). The
  page shows the newest. With several hosts all call it, and process 0 writes.

  Args:
    workdir: the run directory.
    config: of the run.
    tokenizer: the actor's.
    records: that `numbers` are positions of.
    first: the step that the run goes on from; lines of later steps are removed.
    writers: are given the answers of a rollout as the table "rollouts".
  """
  every, path = config.ppo.log_samples_every, os.path.join(workdir, FILE)
  writes, kept, shown = jax.process_index() == 0, "", collections.deque(maxlen=ON_PAGE)

  def write(lines: list[dict]) -> None:
    for step, group in itertools.groupby(lines, lambda line: line["step"]):
      shown.append(f"<h2>step {step}</h2>{_sections(records, list(group))}")
    storage.write(path, kept)
    storage.write(os.path.join(workdir, PAGE), html.page("Rollouts", reversed(shown)))

  if writes:
    kept = run_directory.metrics_until(epath.Path(path), first)
    if kept or every:
      lines = [json.loads(line) for line in kept.splitlines()]
      steps = sorted({line["step"] for line in lines})[-ON_PAGE:]
      write([line for line in lines if line["step"] in steps])

  def show(step: int, rollout: collect.Rollout, numbers) -> None:
    nonlocal kept
    if not every or (step - 1) % every:
      return
    kl = collect.divergence(rollout)  # of all hosts
    if not writes:
      return
    texts, lengths = rollout.texts(tokenizer), rollout.lengths
    order = np.argsort(numbers, kind="stable")  # by record: rows depend on the mesh
    places = [(b, n) for b in order for n, m in enumerate(lengths[b]) if m]
    lines = []
    for b, n in places[: config.ppo.log_samples]:
      record, line = records[numbers[b]], data.shown(int(numbers[b]), records[numbers[b]])
      reference = data.reference(record)
      if reference is not None:
        line["reference"] = reference
      values = {
        "sample": n,
        "answer": texts[b][n],
        "tokens": int(lengths[b, n]),
        "ended": bool(rollout.ended[b, n]),
        "score": directory.number(rollout.scores[b, n]),
        "kl": directory.number(kl[b, n]),
      }
      lines.append({"step": step} | line | values)
    kept += "".join(json.dumps(line) + "\n" for line in lines)
    write(lines)
    tables.write(writers, "rollouts", step, records, lines)

  return show


def _sections(records, lines: list[dict]) -> str:
  """Returns a section of the page for each record among the lines of a rollout."""
  lines = [line if line["ended"] else line | {"reason": "no end token"} for line in lines]
  groups = itertools.groupby(lines, lambda line: line["record"])
  parts = (gallery.section(records[n], list(group), _VALUES) for n, group in groups)
  return "\n".join(parts)
