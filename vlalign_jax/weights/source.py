"""Opens the model that a config names: a LLaVA directory, one of each tower, or a run.

Opening reads configs, tokenizer and tensor headers, and reports every mistake that shows without
reading weights; `weights.load` then reads the weights.
"""

import dataclasses
import os

from vlalign_jax import json_files, storage, trees
from vlalign_jax.data.image_processor import ImagePreprocessor
from vlalign_jax.data.templates import end_tokens
from vlalign_jax.errors import InputError
from vlalign_jax.models import lora, vlm
from vlalign_jax.models.vlm import LANGUAGE, SCORE, ModelConfig
from vlalign_jax.runs import checkpoints, run_directory
from vlalign_jax.weights import (
  adapters,
  assemble,
  families,
  hf_config,
  llava_layout,
  merged,
  peft,
  provenance,
  tensors,
  towers,
)
from vlalign_jax.weights.parts import (
  IMAGE_TOKEN,
  ModelSource,
  from_parts,
  load_generation,
  load_tokenizer,
  with_ends,
)

VIDEOS = "video_preprocessor_config.json"  # of processors that take videos, too; exports copy it


def absolute_paths(config) -> None:
  """Makes the paths of a run's models absolute, so that it can be resumed from any directory."""
  for group, keys in (("model", ("init_from", "vision", "language")), ("lora", ("init_from",))):
    for key in keys:
      if config[group][key]:
        config[group][key] = storage.absolute(config[group][key])
  if "ppo" in config and config.ppo.reward_model:
    config.ppo.reward_model = storage.absolute(config.ppo.reward_model)


def open_for(config, head: str = LANGUAGE) -> ModelSource:
  """Opens the model that a training run starts from.

  Args:
    config: of the run: `model`, `lora` and data.image_aspect.
    head: that the run trains, one of models.vlm's LANGUAGE and SCORE.

  Raises:
    InputError: see `open_source`; or a run that trains a policy starts from a reward model.
  """
  opened = open_source(config.model, config.data.image_aspect)
  opened = _with_head(opened, head, config.model.init_from)
  model = with_adapters(opened.config, config.lora)
  return dataclasses.replace(opened, config=model, start=adapters.open_start(config, model, opened))


def with_adapters(model: ModelConfig, group) -> ModelConfig:
  """Returns the architecture with the adapters of a config's `lora` group, if it has any.

  Raises:
    InputError: no linear map matches lora.targets.
  """
  config = lora.from_group(group)
  if config:
    lora.check_targets(config, trees.flatten(vlm.abstract_params(model)[1]))
  return dataclasses.replace(model, lora=config)


def check_head(opened: ModelSource, head: str, key: str, where: str) -> None:
  """Refuses a reward model where a policy is wanted, and the reverse.

  Args:
    opened: the model.
    head: the head that it must have, LANGUAGE or SCORE of models.vlm.
    key: the config key that names the model.
    where: the value of that key.

  Raises:
    InputError: it has the other head.
  """
  if opened.config.head == head:
    return
  if head == LANGUAGE:
    raise InputError(
      f"{key}={where} is a reward model, which has no language head; name a policy: a LLaVA "
      "directory, or a run of sft or dpo"
    )
  raise InputError(
    f"{key}={where} is a policy, which has no score head; name a reward model: a run of "
    "scripts/train_reward.py or its export"
  )


def _with_head(opened: ModelSource, head: str, where: str) -> ModelSource:
  if opened.config.head == SCORE or head == LANGUAGE:
    check_head(opened, head, "model.init_from", where)
    return opened
  # A new reward model is a policy with a fresh score head.
  config = dataclasses.replace(opened.config, head=SCORE)
  return dataclasses.replace(opened, config=config, fresh=(*opened.fresh, "score/"))


def open_source(model, aspect: str = "auto") -> ModelSource:
  """Opens what the `model` group of a config names.

  Args:
    model: has `init_from`, or `vision` and `language` with `projector`, `vision_feature_layer` and
      `vision_feature_select_strategy`; and `mmca`. A model with multi-modal causal attention keeps
      it, even if `mmca` is false.
    aspect: see ImagePreprocessor.

  Raises:
    InputError: something is missing or damaged, or the parts do not fit together.
  """
  if bool(model.init_from) == bool(model.vision or model.language):
    raise InputError(
      "give either model.init_from (a LLaVA directory or a run directory) or both model.vision "
      "and model.language (such as a CLIP and a LLaMA directory)"
    )
  opened = _open(model, aspect)
  mmca = opened.config.mmca or model.mmca
  if mmca and not families.of(opened.config).takes_mmca:
    raise InputError(
      f"model.mmca is true, and multi-modal causal attention is for LLaVA only: {model.init_from} "
      f"is of type {opened.config.family!r}; set it to false"
    )
  return dataclasses.replace(opened, config=dataclasses.replace(opened.config, mmca=mmca))


def _open(model, aspect: str) -> ModelSource:
  if not model.init_from:
    return assemble.open_towers(model, aspect)
  storage.check(model.init_from, "model.init_from")
  if run := checkpoints.find_run(model.init_from):
    return _open_run(*run, aspect)
  if os.path.isfile(os.path.join(model.init_from, peft.CONFIG)):
    base = merged.base_of(model.init_from)
    if checkpoints.find_run(base):
      raise InputError(
        f"{model.init_from}/{peft.CONFIG}: its base {base} is a run; export that with "
        "scripts/export_hf.py, and set the base to the export"
      )
    return merged.with_adapters(_open_directory(base, aspect), model.init_from)
  return _open_directory(model.init_from, aspect)


def is_convertible(directory: str) -> bool:
  """Returns whether a directory has PEFT adapters or the layout of LLaVA's original repository."""
  adapted = os.path.isfile(os.path.join(directory, peft.CONFIG))
  return adapted or llava_layout.read(directory) is not None


def _open_directory(directory: str, aspect: str) -> ModelSource:
  if (config := llava_layout.read(directory)) is not None:
    return _open_original_llava(directory, config, aspect)
  return _open_whole(directory, aspect)


def _open_original_llava(directory: str, config: dict, aspect: str) -> ModelSource:
  """Opens a model in the layout of LLaVA's original repository."""
  tower = llava_layout.tower_of(directory, config)
  tokenizer = load_tokenizer(directory)
  tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
  hf = llava_layout.convert(config, tower, tokenizer, directory)
  kind = towers.processor_of(hf.vision_config)
  images = ImagePreprocessor.from_directory(tower, llava_layout.aspect_of(config, aspect), kind)
  opened = from_parts(hf, load_generation(directory, tokenizer), tokenizer, images, directory)
  hf.image_seq_length = opened.config.tokens_per_image
  stored = tensors.find_tensors(directory)
  if not any(name.startswith("vision.") for name in stored):
    vision = tensors.find_tensors(tower)
    stored |= {name: tensor for name, tensor in vision.items() if name.startswith("vision.")}
  return dataclasses.replace(opened, tensors=stored, fresh=(), new_tokens=True)


def _open_whole(directory: str, aspect: str) -> ModelSource:
  hf = hf_config.read_config(directory)
  families.check_type(hf, directory)
  hf_config.check_types(hf.vision_config, directory, hf.text_config, directory)
  tokenizer = load_tokenizer(directory)
  images = ImagePreprocessor.from_directory(directory, aspect, _processor_of(hf))
  generation = load_generation(directory, tokenizer)
  opened = from_parts(hf, generation, tokenizer, images, directory)
  videos = (json_files.read(os.path.join(directory, "processor_config.json")) or {}).get(
    "video_processor"
  ) or json_files.read(os.path.join(directory, VIDEOS))
  if opened.hf.architectures and opened.hf.architectures[0].startswith(hf_config.OWN_FAMILY):
    stored = tensors.find_tensors(directory, hf_config.PROJECTOR)
    for tower in hf_config.TOWERS:
      stored |= tensors.find_tensors(os.path.join(directory, tower))
  else:
    stored = tensors.find_tensors(directory)
  return dataclasses.replace(
    opened, tensors=stored, fresh=(), other_files={VIDEOS: videos} if videos else {}
  )


def _open_run(directory: str, which: str, aspect: str) -> ModelSource:
  config = run_directory.stored_config(directory)
  base = open_source(_Group(config["model"]), aspect)
  base = provenance.check(base, directory)
  files = storage.local(f"{directory}/model")
  trained = hf_config.read_config(files)
  head = SCORE if hf_config.is_reward_model(trained) else LANGUAGE
  base = _with_head(base, head, config["model"]["init_from"])
  tokenizer = load_tokenizer(files)
  ends = end_tokens(config["data"]["template"], tokenizer)
  step = checkpoints.find_step(directory, which, config["metric_for_best_model"])
  return dataclasses.replace(
    base,
    tokenizer=tokenizer,
    generation=with_ends(base.generation, ends),
    images=ImagePreprocessor.from_directory(files, aspect, _processor_of(trained)),
    runs=(*base.runs, (directory, step)),
  )


def _processor_of(hf) -> str:
  """Returns the class of a model's image processor if its file names none."""
  return families.FAMILIES[hf.model_type].processor or towers.processor_of(hf.vision_config)


class _Group(dict):
  """Gives the keys of a config group that was read from JSON as attributes."""

  __getattr__ = dict.__getitem__
