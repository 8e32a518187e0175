"""Converts Hugging Face configs to the configs of `models`."""

import os
from typing import Any

from transformers import AutoConfig

from vlalign_jax.errors import InputError
from vlalign_jax.models import activations
from vlalign_jax.models.llama import LanguageConfig
from vlalign_jax.models.projector import ProjectorConfig
from vlalign_jax.models.rope import ROPE_KINDS, RopeConfig
from vlalign_jax.models.vit import VisionConfig
from vlalign_jax.weights import families, towers
from vlalign_jax.weights.decoders import DECODERS

# For models that transformers has no class for: the start of their architectures' names, the
# directory of each tower with the path prefixes of its parameters, and the projector's file.
OWN_FAMILY = "Vlalign"
TOWERS = {"vision": ("vision/",), "language": ("language/", "score/")}
PROJECTOR = "projector"
# The end of transformers' class names of models with a score head instead of a language head.
REWARD_ARCHITECTURE = "ForSequenceClassification"


def read_config(directory: str):
  """Returns the transformers config object of a model directory.

  Raises:
    InputError: config.json is missing or unreadable.
  """
  path = os.path.join(directory, "config.json")
  if not os.path.isfile(path):
    raise InputError(f"{directory}: no config.json there; give a Hugging Face model directory")
  try:
    config = AutoConfig.from_pretrained(directory)
  except (OSError, ValueError, KeyError, TypeError) as error:
    reason = str(error).splitlines()[0]
    raise InputError(f"{path}: not a config that transformers understands: {reason}") from error
  vision: Any = getattr(config, "vision_config", None)
  if hasattr(type(vision), "model_type"):  # not a plain table, as other models may have
    # Published files of Idefics3 and SmolVLM have the type of the whole model there.
    vision.model_type = type(vision).model_type
  return config


def check_types(vision, vision_where: str, language, language_where: str) -> None:
  """Raises an InputError unless the configs of both towers are of supported types."""
  _check_type(vision, tuple(towers.TOWERS), "vision tower", vision_where)
  _check_type(language, tuple(DECODERS), "language model", language_where)


def _check_type(hf, types: tuple[str, ...], part: str, where: str) -> None:
  if hf.model_type not in types:
    supported = ", ".join(types)
    raise InputError(f"{where}: {part} of type {hf.model_type!r}; supported: {supported}")


def feature_layers(index: int | list[int], layers: int, where: str) -> tuple[int, ...]:
  """Returns `vision_feature_layer` as hidden states 0..layers (0 is the input of layer 1)."""
  indices = [index] if isinstance(index, int) else list(index)
  for i in indices:
    if not -layers - 1 <= i <= layers:
      raise InputError(
        f"{where}: vision_feature_layer {i} of a tower with {layers} layers; "
        f"choose from {-layers - 1} to {layers}"
      )
  return tuple(i + layers + 1 if i < 0 else i for i in indices)


def keeps_class_token(strategy: str, where: str) -> bool:
  """Returns whether `vision_feature_select_strategy` keeps the first embedding of the tower."""
  if strategy not in ("default", "full"):
    raise InputError(
      f"{where}: vision_feature_select_strategy {strategy!r} is not 'default' or 'full'"
    )
  return strategy == "full"


def vision_config(hf, index: int | list[int], strategy: str, where: str) -> VisionConfig:
  """Converts the config of a tower whose type is in `towers.TOWERS`.

  Args:
    hf: transformers' config of the tower.
    index: LLaVA's `vision_feature_layer`.
    strategy: LLaVA's `vision_feature_select_strategy`: `default` leaves out the first embedding,
      `full` does not. As in transformers, `default` does so in a tower without a class token too.
    where: name of the config in errors.

  Raises:
    InputError: the tower or its features are not supported.
  """
  _check_type(hf, tuple(towers.TOWERS), "vision tower", where)
  if hf.num_channels != 3:
    raise InputError(f"{where}: num_channels is {hf.num_channels}; only RGB towers are supported")
  if getattr(hf, "tie_last_hidden_states", False):
    raise InputError(
      f"{where}: tie_last_hidden_states, features behind the tower's last norm, is not supported"
    )
  used = feature_layers(index, hf.num_hidden_layers, where)
  return towers.TOWERS[hf.model_type].config(
    width=hf.hidden_size,
    mlp_width=hf.intermediate_size,
    layers=max(used),
    heads=hf.num_attention_heads,
    image_size=_side(hf, "image_size", where),
    patch_size=_side(hf, "patch_size", where),
    activation=activations.check(hf.hidden_act, where),
    norm_epsilon=hf.layer_norm_eps,
    feature_layers=used,
    keep_class_token=keeps_class_token(strategy, where),
    **towers.TOWERS[hf.model_type].fields(hf, where),
  )


def _side(hf, key: str, where: str) -> int:
  """Returns the side of a square, which a config gives as one number or as two equal ones."""
  size = getattr(hf, key)
  sides = set(size) if isinstance(size, (list, tuple)) else {size}
  side = sides.pop()
  if sides or not isinstance(side, int):
    raise InputError(f"{where}: {key} is {size}; give the side of a square")
  return side


def rope_config(hf, where: str) -> RopeConfig:
  """Converts `rope_parameters`; transformers has converted an older `rope_scaling` to it."""
  rope = dict(hf.rope_parameters or {})
  kind = rope.get("rope_type", "default")
  if kind not in ROPE_KINDS:
    raise InputError(f"{where}: RoPE of type {kind!r}; supported: {', '.join(ROPE_KINDS)}")
  if rope.get("partial_rotary_factor", 1.0) != 1.0:
    raise InputError(f"{where}: partial_rotary_factor other than 1 is not supported")
  return RopeConfig(
    theta=float(rope.get("rope_theta", 10_000.0)),
    kind=kind,
    factor=float(rope.get("factor", 1.0)),
    low_frequency_factor=float(rope.get("low_freq_factor", 1.0)),
    high_frequency_factor=float(rope.get("high_freq_factor", 4.0)),
    original_length=int(rope.get("original_max_position_embeddings") or hf.max_position_embeddings),
  )


def language_config(hf, where: str, *, tied: bool, vocab_size: int) -> LanguageConfig:
  """Converts the config of a language model whose type is in DECODERS."""
  _check_type(hf, tuple(DECODERS), "language model", where)
  return LanguageConfig(
    vocab_size=vocab_size,
    width=hf.hidden_size,
    mlp_width=hf.intermediate_size,
    layers=hf.num_hidden_layers,
    heads=hf.num_attention_heads,
    kv_heads=hf.num_key_value_heads,
    head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
    norm_epsilon=hf.rms_norm_eps,
    rope=rope_config(hf, where),
    tied_embeddings=tied,
    activation=activations.check(hf.hidden_act, where),
    **DECODERS[hf.model_type](hf, where),
  )


def is_reward_model(hf: Any) -> bool:
  """Returns whether config.json names a reward model's architecture, see `weights.export`."""
  return any(name.endswith(REWARD_ARCHITECTURE) for name in hf.architectures or ())


def parts_of(hf: Any, where: str) -> tuple[VisionConfig, ProjectorConfig, LanguageConfig]:
  """Converts the parts of a model's config; `projector_type` is ours, see `weights.export`."""
  family = families.FAMILIES[hf.model_type]
  families.check_tower(hf, where)
  vision = vision_config(hf.vision_config, *family.features_of(hf), where)
  language = language_config(
    hf.text_config, where, tied=hf.tie_word_embeddings, vocab_size=hf.text_config.vocab_size
  )
  return vision, family.projector(hf, vision, language.width), language
