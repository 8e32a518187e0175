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
    root = _root(run, first["images"])
    files = [os.path.join(root, image) for image in first["images"]]
    parts.append(gallery.answers_section(where, files, lines, _VALUES))
  return parts


def _root(run: Run, images: list[str]) -> str:
  """Returns the directory that pictures start at: data.images, or that of a data file."""
  if run.config["data.images"]:
    return run.config["data.images"]
  files = [run.config.get(key) or "" for key in ("data.train", "data.eval")]
  names = [file.strip() for file in ",".join(files).split(",") if file.strip()]
  roots = [name if os.path.isdir(name) else os.path.dirname(name) for name in names]
  having = (root for root in roots if images and os.path.exists(os.path.join(root, images[0])))
  return next(having, roots[0])
