"""Where a model comes from: a LLaVA directory, a CLIP and a LLaMA directory, or a run of ours.

Opening a source reads configs, tokenizer and tensor headers and finds every mistake that can be
found without reading weights; `weights.load` then reads them.
"""

import dataclasses
import os

from transformers import AutoTokenizer, GenerationConfig, LlavaConfig, PreTrainedTokenizerBase

from vlalign_jax import storage, trees
from vlalign_jax.data.images import ImagePreprocessor
from vlalign_jax.errors import InputError
from vlalign_jax.models import lora, vlm
from vlalign_jax.models.projector import PROJECTORS
from vlalign_jax.models.vlm import LANGUAGE, SCORE, ModelConfig
from vlalign_jax.training import checkpoints, run_directory
from vlalign_jax.weights import adapters, hf_config, pin, tensors

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# What a run's stage trains; the others train what speaks.
HEADS = {"reward": SCORE}
# Vocabulary sizes of new models are multiples of this, so that they split over devices.
VOCABULARY_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Source:
  """A model that can be loaded.

  Attributes:
    config: our architecture.
    hf: the model's LLaVA config, the vision tower whole as in the source.
    generation: its generation config.
    tokenizer: knows `<image>` and a pad token.
    images: turns pictures into the tower's pixels.
    tensors: canonical name -> tensor in a file.
    fresh: parameter path prefixes that start from random weights.
    runs: run directories with the checkpoint step to take trained parameters from, oldest first;
      adapters among these are merged into the weights.
    start: what the adapters of `config` start from, if they are not fresh.
  """

  config: ModelConfig
  hf: LlavaConfig
  generation: GenerationConfig
  tokenizer: PreTrainedTokenizerBase
  images: ImagePreprocessor
  tensors: dict[str, tensors.Tensor]
  fresh: tuple[str, ...] = ()
  runs: tuple[tuple[str, int], ...] = ()
  start: adapters.Start | None = None

  @property
  def assembled(self) -> bool:
    """Whether it is made of two towers, whose vocabulary may be smaller than the model's."""
    return "projector/" in self.fresh


def absolute_paths(config) -> None:
  """Makes the paths of a run's models independent of where the run is started from."""
  for group, keys in (("model", ("init_from", "vision", "language")), ("lora", ("init_from",))):
    for key in keys:
      if config[group][key]:
        config[group][key] = storage.absolute(config[group][key])
  if "ppo" in config and config.ppo.reward_model:
    config.ppo.reward_model = storage.absolute(config.ppo.reward_model)


def open_for(config) -> Source:
  """The model that a training run starts from, with the head that its stage trains.

  Args:
    config: of the run: stage, `model`, `lora` and data.image_aspect.

  Raises:
    InputError: as `open_source`; or a policy is to be trained from a reward model.
  """
  opened = open_source(config.model, config.data.image_aspect)
  opened = _with_head(opened, HEADS.get(config.stage, LANGUAGE), config.model.init_from)
  model = with_adapters(opened.config, config.lora)
  return dataclasses.replace(opened, config=model, start=adapters.open_start(config, model))


def with_adapters(model: ModelConfig, group) -> ModelConfig:
  """The architecture with the adapters of a config's `lora` group, if it has any.

  Raises:
    InputError: they sit nowhere.
  """
  config = lora.from_group(group)
  if config:
    lora.check_targets(config, trees.flatten(vlm.abstract_params(model)[1]))
  return dataclasses.replace(model, lora=config)


def check_head(opened: Source, head: str, key: str, where: str) -> None:
  """Refuses a reward model where a policy is wanted, and the reverse.

  Args:
    opened: the model.
    head: what it must have, one of models.vlm's LANGUAGE and SCORE.
    key: the config key that names it.
    where: the directory that it names.

  Raises:
    InputError: it has the other head.
  """
  if opened.config.head == head:
    return
  if head == LANGUAGE:
    raise InputError(
      f"{key}={where} is a reward model, which scores and does not speak; name a policy: a LLaVA "
      "directory, or a run of sft or dpo"
    )
  raise InputError(
    f"{key}={where} is a policy, which has no score head; name a reward model: a run of "
    "scripts/train_reward.py or its export"
  )


def _with_head(opened: Source, head: str, where: str) -> Source:
  if opened.config.head == SCORE or head == LANGUAGE:
    check_head(opened, head, "model.init_from", where)
    return opened
  # A reward model begins as a policy with a head of its own.
  config = dataclasses.replace(opened.config, head=SCORE)
  return dataclasses.replace(opened, config=config, fresh=(*opened.fresh, "score/"))


def open_source(model, aspect: str = "auto") -> Source:
  """Opens what the `model` group of a config names.

  Args:
    model: has `init_from`, or `vision` and `language` with `projector`, `vision_feature_layer` and
      `vision_feature_select_strategy`.
    aspect: see ImagePreprocessor.

  Raises:
    InputError: something is missing, damaged, or does not fit together.
  """
  if bool(model.init_from) == bool(model.vision or model.language):
    raise InputError(
      "give either model.init_from (a LLaVA directory or a run directory) or both model.vision "
      "and model.language (a CLIP and a LLaMA directory)"
    )
  if not model.init_from:
    return _assemble(model, aspect)
  storage.check(model.init_from, "model.init_from")
  if run := checkpoints.find_run(model.init_from):
    return _open_run(*run, aspect)
  return _open_llava(model.init_from, aspect)


def _load_tokenizer(directory: str) -> PreTrainedTokenizerBase:
  if not any(os.path.isfile(os.path.join(directory, name)) for name in TOKENIZER_FILES):
    raise InputError(
      f"{directory}: no {' or '.join(TOKENIZER_FILES)} there; copy the tokenizer's files from the "
      "model that this is"
    )
  try:
    return AutoTokenizer.from_pretrained(directory)
  except Exception as error:  # transformers and tokenizers raise nearly anything on a broken file
    reason = str(error).splitlines()[0]
    if "tiktoken" in reason:  # what transformers tries next, and what it then asks for
      reason = "tokenizer.model is not a SentencePiece model, and there is no tokenizer.json"
    raise InputError(
      f"{directory}: its tokenizer cannot be loaded ({reason}); copy its files again"
    ) from error


def _load_generation(directory: str, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
  if os.path.isfile(os.path.join(directory, "generation_config.json")):
    try:
      return GenerationConfig.from_pretrained(directory)
    except (OSError, ValueError, TypeError) as error:
      raise InputError(f"{directory}/generation_config.json: cannot be read; mend it") from error
  return GenerationConfig(
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
  )


def _model_config(
  hf: LlavaConfig, images: ImagePreprocessor, tokenizer: PreTrainedTokenizerBase, where: str
) -> ModelConfig:
  vision, projector, language = hf_config.parts_of(hf, where)
  if (images.height, images.width) != (vision.image_size, vision.image_size):
    raise InputError(
      f"{where}: its image processor makes {images.height} x {images.width} pictures, its vision "
      f"tower takes {vision.image_size} x {vision.image_size}; mend preprocessor_config.json"
    )
  token_id = hf.image_token_id
  if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != token_id:
    raise InputError(
      f"{where}: config.json says image_token_index {token_id}, the tokenizer has {IMAGE_TOKEN} at "
      f"{tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)}; mend the wrong one"
    )
  if len(tokenizer) > language.vocab_size:
    raise InputError(
      f"{where}: the tokenizer has {len(tokenizer)} tokens, the embedding only "
      f"{language.vocab_size} rows"
    )
  return ModelConfig(
    vision=vision,
    projector=projector,
    language=language,
    image_token_id=token_id,
    image_mean=tuple(images.mean),
    image_std=tuple(images.std),
    rescale_factor=images.rescale_factor,
    head=SCORE if hf_config.is_reward_model(hf) else LANGUAGE,
  )


def _open_llava(directory: str, aspect: str) -> Source:
  hf = hf_config.read_config(directory)
  if not isinstance(hf, LlavaConfig):
    raise InputError(
      f"{directory}: a model of type {hf.model_type!r}, not 'llava'; towers of their own go into "
      "model.vision and model.language"
    )
  tokenizer = _load_tokenizer(directory)
  images = ImagePreprocessor.from_directory(directory, aspect)
  generation = _load_generation(directory, tokenizer)
  return dataclasses.replace(
    from_parts(hf, generation, tokenizer, images, directory),
    tensors=tensors.find_tensors(directory),
    fresh=(),
  )


def from_parts(
  hf: LlavaConfig,
  generation: GenerationConfig,
  tokenizer: PreTrainedTokenizerBase,
  images: ImagePreprocessor,
  where: str,
) -> Source:
  """A model without weights; every parameter of it is fresh.

  Args:
    hf, generation, tokenizer, images: see Source.
    where: what to call the model in errors.

  Raises:
    InputError: the parts do not fit together.
  """
  return Source(
    config=_model_config(hf, images, tokenizer, where),
    hf=hf,
    generation=generation,
    tokenizer=_with_pad_token(tokenizer, where),
    images=images,
    tensors={},
    fresh=("vision/", "projector/", "language/"),
  )


def _with_pad_token(tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
  """Padding never reaches a loss or an attended position, so any existing token will do."""
  if tokenizer.pad_token_id is None:
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
  if tokenizer.pad_token_id is None:
    raise InputError(f"{where}: the tokenizer has no pad, unk or eos token; give it one")
  return tokenizer


def _assemble(model, aspect: str) -> Source:
  for key in ("vision", "language"):
    if not model[key]:
      raise InputError(f"model.{key} is empty: a new model takes a CLIP and a LLaMA directory")
  if model.projector not in PROJECTORS:
    raise InputError(f"model.projector is {model.projector!r}; choose from {', '.join(PROJECTORS)}")
  vision = hf_config.read_config(model.vision)
  vision = getattr(vision, "vision_config", vision)
  language = hf_config.read_config(model.language)
  hf_config.check_types(vision, model.vision, language, model.language)
  tokenizer = _load_tokenizer(model.language)
  tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
  if tokenizer.pad_token_id is None:
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
  multiple = VOCABULARY_MULTIPLE
  rows = max(language.vocab_size, -(-len(tokenizer) // multiple) * multiple)
  language.vocab_size = rows
  try:
    feature_layers = [int(layer) for layer in str(model.vision_feature_layer).split(",")]
  except ValueError:
    raise InputError(
      f"model.vision_feature_layer is {model.vision_feature_layer!r}; give a layer number such as "
      "-2, or several, comma-separated"
    ) from None
  hf = LlavaConfig(
    vision_config=vision,
    text_config=language,
    image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    vision_feature_layer=feature_layers if len(feature_layers) > 1 else feature_layers[0],
    vision_feature_select_strategy=model.vision_feature_select_strategy,
    tie_word_embeddings=language.tie_word_embeddings,
    projector_type=model.projector,
  )
  images = ImagePreprocessor.from_directory(model.vision, aspect)
  where = f"{model.vision} with {model.language}"
  parts = from_parts(hf, _load_generation(model.language, tokenizer), tokenizer, images, where)
  hf.image_seq_length = parts.config.tokens_per_image
  towers = [
    {name: found for name, found in tensors.find_tensors(directory).items() if name.startswith(own)}
    for directory, own in ((model.vision, "vision."), (model.language, "language."))
  ]
  return dataclasses.replace(parts, tensors=towers[0] | towers[1], fresh=("projector/",))


def _open_run(directory: str, which: str, aspect: str) -> Source:
  config = run_directory.stored_config(directory)
  base = open_source(_Group(config["model"]), aspect)
  base = pin.check(base, directory)
  base = _with_head(base, HEADS.get(config["stage"], LANGUAGE), config["model"]["init_from"])
  files = storage.local(f"{directory}/model")
  step = checkpoints.find_step(directory, which, config["best_metric"])
  return dataclasses.replace(
    base,
    tokenizer=_load_tokenizer(files),
    images=ImagePreprocessor.from_directory(files, aspect),
    runs=(*base.runs, (directory, step)),
  )


class _Group(dict):
  """A config group as read from JSON, with its keys as attributes."""

  __getattr__ = dict.__getitem__
