"""Answers records, or scores their answers. See configs/predict.py.

python scripts/predict.py --config=configs/predict.py --workdir=DIR [--config.KEY=VALUE ...]

Writes a line for each answer to DIR/predictions.jsonl, then DIR/metrics.json and DIR/gallery.html.
The same command resumes where it stopped.
"""

from absl import flags
from ml_collections import config_flags

from vlalign_jax import cli
from vlalign_jax.prediction.predict import predict


def main(_):
  predict(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "configs/predict.py")
  flags.DEFINE_string("workdir", "", "The directory to write predictions to.")
  cli.run(main)
