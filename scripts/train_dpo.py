"""Direct preference optimization. See configs/dpo.py for presets, ARCHITECTURE.md for how it works.

python scripts/train_dpo.py --config=configs/dpo.py:PRESET --workdir=DIR [--config.KEY=VALUE ...]
  [--profile=STEPS]
"""

from absl import flags
from ml_collections import config_flags

from vlalign_jax import cli
from vlalign_jax.stages import dpo
from vlalign_jax.training import run


def train_and_evaluate(c, workdir: str, profile: int = 0) -> None:
  """Trains by a config into a run directory, or goes on with the run that is there."""
  run.train_and_evaluate(dpo.STAGE, c, workdir, profile)


def main(_):
  train_and_evaluate(flags.FLAGS.config, flags.FLAGS.workdir, flags.FLAGS.profile)


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "Such as configs/dpo.py:llava15_7b.")
  flags.DEFINE_string("workdir", "", "The run directory.")
  flags.DEFINE_integer("profile", 0, "Steps to trace into WORKDIR/profile.", lower_bound=0)
  cli.run(main, several_hosts=True)
