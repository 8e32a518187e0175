"""Answers with their pictures: of a run's newest rollout, or of a prediction."""

import itertools
import os

from vlalign_jax import html
from vlalign_jax.prediction import gallery
from vlalign_jax.report.directory import Run

MOST_RECORDS = 12  # of each run: a picture takes some 5 kB
_VALUES = ("score", "kl", "reward", "logprob", "tokens", "num_tokens")


def sections(run: Run) -> list[str]:
  """Returns HTML of a run's samples; [] if it has none."""
  if not run.samples:
    return []
  groups = [[*group] for _, group in itertools.groupby(run.samples, lambda line: line["record"])]
  shown = groups[:MOST_RECORDS]
  step = f"step {run.samples[0]['step']}, " if "step" in run.samples[0] else ""
  parts = [
    f"<h3>{html.text(run.name)}</h3>",
    f'<p class="label">{step}{len(shown)} of {len(groups)} records</p>',
  ]
  for lines in shown:
    first = lines[0]
    where = f'record {first["record"]} ("id": "{first["id"]}")'
    files = [os.path.join(first.get("image_root", ""), image) for image in first["images"]]
    parts.append(gallery.answers_section(where, files, lines, _VALUES))
  return parts
