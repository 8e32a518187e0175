"""The stages, one file each. A new one is a file here, its loss, and a line of STAGES."""

from vlalign_jax.errors import InputError
from vlalign_jax.stage import Stage
from vlalign_jax.stages import dpo, ppo, reward, sft

STAGES: dict[str, Stage] = {
  stage.name: stage for stage in (sft.STAGE, reward.STAGE, dpo.STAGE, ppo.STAGE)
}


def of_config(config) -> Stage:
  """Returns the stage that a config is for.

  Raises:
    InputError: there is no config, or it is not one of a stage.
  """
  if config is None:
    raise InputError("--config is missing: such as --config=configs/sft.py:llava15_7b")
  if config.get("stage") not in STAGES:
    raise InputError(
      f"this is a config of the stage {config.get('stage')!r}; give one of {', '.join(STAGES)}"
    )
  return STAGES[config.stage]


def defaults(name: str):
  """Returns all keys of a stage with their defaults."""
  return STAGES[name].defaults()


def check(config, name: str) -> None:
  """Refuses a config that no run of a stage can have, see `Stage.check`."""
  STAGES[name].check(config)
