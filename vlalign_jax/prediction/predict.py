"""Predicts from a config into a directory: answers, metrics and an HTML page."""

import functools
import json
import os

import jax
from absl import logging

from vlalign_jax import matmul_precision, out_of_memory, storage
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
  tables,
)
from vlalign_jax.prediction import records as data
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.writers import choose as writers


def predict(c, workdir: str) -> tuple[list[dict], tuple]:
  """Predicts by a config, or resumes the prediction that the directory has.

  Args:
    c: a config with the keys of `settings.defaults`; its paths become absolute.
    workdir: the directory to write to.

  Returns:
    (lines of predictions.jsonl, their records).

  Raises:
    InputError: names the first mistake.
  """
  # --- Config, models and records, checked before anything is computed ---
  settings.check(c)
  writers.check(c.log)
  if jax.process_count() > 1:
    raise InputError("prediction runs in one process, on all devices that it sees; start only one")
  mesh = meshes.make_mesh(c.mesh)
  matmul_precision.set_for(c.model.dtype, mesh.devices.flat[0].platform)
  head = SCORE if c.mode == settings.REWARD else LANGUAGE
  opened = {"model.init_from": models.open_model(c, "model.init_from", head)}
  if c.reward_model:
    opened["reward_model"] = models.open_model(c, "reward_model", SCORE)
  model, reward_model = opened["model.init_from"], opened.get("reward_model")
  records = data.load_records(c)
  sampling = settings.sampling(c, model)
  directory.open_directory(workdir, c, data.inputs(records, opened))

  # --- Answers, one line each; only one model is on the devices at a time ---
  def make_load(opened, mesh):
    load = functools.partial(models.load_model, opened, c.model.dtype, mesh, c.model.attention)
    return out_of_memory.explained(out_of_memory.LOADING, c)(load)

  load = make_load(model, mesh)
  if sampling is not None:
    its_mesh = models.sampling_mesh(c, model.config, sampling, mesh)
    load = make_load(model, its_mesh)
    lines = generated.generate(c, workdir, model, load, records, sampling, its_mesh)
    if reward_model:
      load = make_load(reward_model, mesh)
      lines = best.add_rewards(c, workdir, lines, reward_model, load, records, mesh)
    numbers = metrics.summarize_generated(lines)
  else:
    lines = scored.predict_scores(c, workdir, model, load, records, mesh)
    numbers = metrics.summarize_scored(lines, settings.KEYS[c.mode])

  # --- Metrics ---
  storage.write(os.path.join(workdir, "metrics.json"), json.dumps(numbers, indent=2) + "\n")
  if c.gallery:
    page = gallery.gallery(c, lines, records, numbers)
    storage.write(os.path.join(workdir, "gallery.html"), page)
  with writers.opened(c, workdir, resumes=True) as opened_writers:
    for writer in opened_writers:
      writer.scalars(0, numbers)
    numbers_shown = {*gallery.shown_records(c, lines)}
    shown = [line for line in lines if line["record"] in numbers_shown]
    tables.write(opened_writers, "predictions", 0, records, shown)
  for name, value in numbers.items():
    logging.info("%s: %s", name, f"{value:.4g}" if isinstance(value, float) else value)
  return lines, records
