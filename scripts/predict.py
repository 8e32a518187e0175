"""Answers records, or scores the answers that they have. See configs/predict.py.

python scripts/predict.py --config=configs/predict.py --workdir=DIR [--config.KEY=VALUE ...]

Writes DIR/predictions.jsonl as answers come, a line each, then DIR/metrics.json. The same command
goes on where it stopped.
"""

import json
import os

import jax
from absl import flags, logging
from ml_collections import config_flags

from vlalign_jax import cli, storage
from vlalign_jax.errors import InputError
from vlalign_jax.models.vlm import LANGUAGE
from vlalign_jax.prediction import directory, generated, metrics, models, settings
from vlalign_jax.prediction import records as data
from vlalign_jax.sharding import mesh as meshes


def predict(c, workdir: str) -> dict:
  """Predicts by a config into a directory; gives the metrics."""
  # --- What is asked for, checked before anything is computed ---
  settings.check(c)
  if jax.process_count() > 1:
    raise InputError("prediction runs in one process, on all devices that it sees; start only one")
  mesh = meshes.make_mesh(c.mesh)
  policy = models.open_model(
    c.model.init_from, "config.model.init_from", LANGUAGE, c.data.image_aspect
  )
  sampling = settings.sampling(c, policy.tokenizer)
  records = data.load_records(c)
  models.check_template(c.model.init_from, c.data.template)
  directory.open_directory(workdir, c, data.inputs(records, {"model.init_from": policy}))

  # --- Answers ---
  def load():
    return models.load_model(policy, c.model.dtype, mesh)[1]

  lines = generated.generate(c, workdir, policy, load, records, sampling, mesh)

  # --- What they are worth ---
  found = metrics.summarise(lines)
  storage.write(os.path.join(workdir, "metrics.json"), json.dumps(found, indent=2) + "\n")
  for name, value in found.items():
    logging.info("%s: %s", name, f"{value:.4g}" if isinstance(value, float) else value)
  return found


def main(_):
  predict(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "configs/predict.py")
  flags.DEFINE_string("workdir", "", "The directory that predictions are written to.")
  cli.run(main)
