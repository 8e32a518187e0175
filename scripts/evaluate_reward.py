"""Evaluates a reward model on ranked answers or pairs.

  python scripts/evaluate_reward.py --config=configs/predict.py --workdir=DIR \\
    --config.model.init_from=runs/reward --config.data.eval=ranked.json --config.data.images=images

Scores the answers as scripts/predict.py does with config.mode=reward. Also writes DIR/reward.json
(accuracy over all ordered pairs, by the number of answers and by the distance of ranks, and
calibration) and DIR/reward.html (the same with plots and the --wrong most wrong pairs). The same
command resumes where it stopped.
"""

import json
import os

from absl import flags, logging
from ml_collections import config_flags

from vlalign_jax import cli, storage
from vlalign_jax.errors import InputError
from vlalign_jax.prediction import metrics, reward_accuracy, reward_page, settings
from vlalign_jax.prediction.predict import predict


def evaluate_reward(c, workdir: str, wrong: int = 20) -> dict:
  """Evaluates by a config of prediction, writes into a directory, and returns the numbers."""
  if c is not None and c.get("stage") == settings.STAGE:
    c.mode = settings.REWARD
  lines, records = predict(c, workdir)
  scored = [line for line in lines if line["reward"] is not None]
  pairs = metrics.ranked_pairs(scored)
  if not pairs:
    raise InputError(
      f"{c.data.eval}: no record has two different answers that fit, ranked best first; there are "
      "no pairs to compare"
    )
  numbers = reward_accuracy.evaluate(scored, pairs) | {"left_out": len(lines) - len(scored)}
  storage.write(os.path.join(workdir, "reward.json"), json.dumps(numbers, indent=2) + "\n")
  page = reward_page.page(c, numbers, pairs, records, wrong)
  storage.write(os.path.join(workdir, "reward.html"), page)
  logging.info(
    "%d of %d pairs are scored in the right order (%.1f %%); expected calibration error %.3f",
    round(numbers["accuracy"] * numbers["pairs"]),
    numbers["pairs"],
    100 * numbers["accuracy"],
    numbers["calibration"]["error"],
  )
  return numbers


def main(_):
  evaluate_reward(flags.FLAGS.config, flags.FLAGS.workdir, flags.FLAGS.wrong)


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "configs/predict.py")
  flags.DEFINE_string("workdir", "", "The directory to write scores and pages to.")
  flags.DEFINE_integer("wrong", 20, "Pairs that reward.html shows, the most wrong first.", 0)
  cli.run(main)
