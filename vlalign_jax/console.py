"""Runs the commands of an installed package: `vlalign-train-sft` runs scripts/train_sft.py."""

import functools
import runpy

from vlalign_jax.errors import InputError

SCRIPTS = (
  "check_data",
  "convert_data",
  "evaluate_reward",
  "export_hf",
  "import_hf",
  "plan",
  "predict",
  "report",
  "train_dpo",
  "train_ppo",
  "train_reward",
  "train_sft",
)


def run_script(name: str) -> None:
  """Runs an installed script with the flags of this process, as `python scripts/NAME.py` does."""
  if name not in SCRIPTS:
    raise InputError(f"no script {name!r}; choose from {', '.join(SCRIPTS)}")
  runpy.run_module(f"vlalign_jax.scripts.{name}", run_name="__main__", alter_sys=True)


def __getattr__(name: str):
  """Returns the function that an entry point names, such as `vlalign_jax.console:train_sft`."""
  if name in SCRIPTS:
    return functools.partial(run_script, name)
  raise AttributeError(name)
