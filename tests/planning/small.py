"""A small model to plan, whose sizes all differ, and a config for it."""

from vlalign_jax import stages
from vlalign_jax.models.clip import VisionConfig
from vlalign_jax.models.llama import LanguageConfig
from vlalign_jax.models.projector import ProjectorConfig
from vlalign_jax.models.rope import RopeConfig
from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.planning import train_step
from vlalign_jax.stages import defaults

LENGTH = 64


def model(
  layers: int = 3, kind: str = "mlp", tied: bool = False, width: int = 64, **fields
) -> ModelConfig:
  """Returns a model with grouped heads that do not add up to the width; an image takes 16 tokens.

  `fields` are further fields of ModelConfig: head, lora.
  """
  return ModelConfig(
    vision=VisionConfig(48, 112, layers - 1, 3, 16, 4, "quick_gelu", 1e-5, (layers - 1,), False),
    projector=ProjectorConfig(kind, 48, width),
    language=LanguageConfig(320, width, 176, layers, 8, 4, 24, 1e-5, RopeConfig(), tied),
    image_token_id=319,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.2, 0.2, 0.2),
    **fields,
  )


def config(kind: str = "sft", **keys):
  """Returns a stage's config with these dotted keys set (double underscores stand for dots)."""
  c = defaults(kind)
  c.batch_size = 8
  c.data.max_length = LENGTH
  for key, value in keys.items():
    *groups, name = key.split("__")
    group = c
    for key in groups:
      group = group[key]
    group[name] = value
  return c


def check(c):
  train_step.check(stages.of_config(c), c)


def model_config(c):
  return train_step.model_config(c, stages.of_config(c).head)


def plan(c, architecture, where, **options):
  """As `train_step.plan`, of the config's own stage."""
  return train_step.plan(stages.of_config(c), c, architecture, where, **options)
