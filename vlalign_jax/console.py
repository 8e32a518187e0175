"""The commands of an installed package: `vlalign-train-sft` is scripts/train_sft.py, and so on."""

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
  """Returns what an entry point calls: `vlalign_jax.console:train_sft` and its likes."""
  if name in SCRIPTS:
    return functools.partial(run_script, name)
  raise AttributeError(name)
