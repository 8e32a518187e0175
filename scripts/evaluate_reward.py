"""Evaluates a reward model on ranked answers or pairs.

  python scripts/evaluate_reward.py --config=configs/predict.py --workdir=DIR \\
    --config.model.init_from=runs/reward --config.data.eval=ranked.json --config.data.images=images

Scores the answers as scripts/predict.py does with config.mode=reward, and also writes
DIR/reward.json: accuracy over all ordered pairs, by the number of answers and by the ranks between
the two, and calibration; and DIR/reward.html: the same with plots and the --wrong most wrong pairs.
The same command goes on where it stopped.
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
  """Evaluates by a config of prediction into a directory; gives the numbers."""
  if c is not None and c.get("stage") == settings.STAGE:
    c.mode = settings.REWARD
  lines, records = predict(c, workdir)
  known = [line for line in lines if line["reward"] is not None]
  pairs = metrics.ranked_pairs(known)
  if not pairs:
    raise InputError(
      f"{c.data.eval}: no record has two different answers that fit, ranked best first; there is "
      "nothing to compare"
    )
  found = reward_accuracy.evaluate(known, pairs) | {"left_out": len(lines) - len(known)}
  storage.write(os.path.join(workdir, "reward.json"), json.dumps(found, indent=2) + "\n")
  page = reward_page.page(c, found, known, pairs, records, wrong)
  storage.write(os.path.join(workdir, "reward.html"), page)
  logging.info(
    "%d of %d pairs are scored in the right order (%.1f %%); expected calibration error %.3f",
    round(found["accuracy"] * found["pairs"]),
    found["pairs"],
    100 * found["accuracy"],
    found["calibration"]["error"],
  )
  return found


def main(_):
  evaluate_reward(flags.FLAGS.config, flags.FLAGS.workdir, flags.FLAGS.wrong)


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "configs/predict.py")
  flags.DEFINE_string("workdir", "", "The directory that scores and pages are written to.")
  flags.DEFINE_integer("wrong", 20, "Pairs that reward.html shows, the most wrong first.", 0)
  cli.run(main)
