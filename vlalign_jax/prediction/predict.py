"""A prediction from a config to a directory: answers, metrics and a page to look at."""

import functools
import json
import os

import jax
from absl import logging

from vlalign_jax import out_of_memory, storage
from vlalign_jax.errors import InputError
from vlalign_jax.models.vlm import LANGUAGE, SCORE
from vlalign_jax.prediction import (
  best,
  directory,
  gallery,
  generated,
  metrics,
  models,
  scored,
  settings,
)
from vlalign_jax.prediction import records as data
from vlalign_jax.sharding import mesh as meshes


def predict(c, workdir: str) -> tuple[list[dict], tuple]:
  """Predicts by a config, or goes on with the prediction that is there.

  Args:
    c: of `settings.defaults`; paths in it become absolute.
    workdir: the directory that all is written to.

  Returns:
    (lines of predictions.jsonl, records that they are about).

  Raises:
    InputError: names the first thing that is wrong.
  """
  # --- What is asked for, checked before anything is computed ---
  settings.check(c)
  if jax.process_count() > 1:
    raise InputError("prediction runs in one process, on all devices that it sees; start only one")
  mesh = meshes.make_mesh(c.mesh)
  head = SCORE if c.mode == settings.REWARD else LANGUAGE
  opened = {"model.init_from": models.open_model(c, "model.init_from", head)}
  if c.reward_model:
    opened["reward_model"] = models.open_model(c, "reward_model", SCORE)
  model, judge = opened["model.init_from"], opened.get("reward_model")
  records = data.load_records(c)
  sampling = settings.sampling(c, model)
  directory.open_directory(workdir, c, data.inputs(records, opened))

  # --- Answers, one line each; a model is on the devices only while it is asked ---
  def make_load(opened):
    load = functools.partial(models.load_model, opened, c.model.dtype, mesh, c.model.attention)
    return out_of_memory.explained(out_of_memory.LOADING, c)(load)

  load = make_load(model)
  if sampling is not None:
    lines = generated.generate(c, workdir, model, load, records, sampling, mesh)
    if judge:
      lines = best.add_rewards(c, workdir, lines, judge, make_load(judge), records, mesh)
    found = metrics.of_generated(lines)
  else:
    lines = scored.predict_given(c, workdir, model, load, records, mesh)
    found = metrics.of_given(lines, settings.KEYS[c.mode])

  # --- What they are worth ---
  storage.write(os.path.join(workdir, "metrics.json"), json.dumps(found, indent=2) + "\n")
  if c.gallery:
    page = gallery.gallery(c, lines, records, found)
    storage.write(os.path.join(workdir, "gallery.html"), page)
  for name, value in found.items():
    logging.info("%s: %s", name, f"{value:.4g}" if isinstance(value, float) else value)
  return lines, records
