"""Opens the parts of a model other than its weights: config, tokenizer, image processor."""

import copy
import dataclasses
import os
from collections.abc import Collection
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from vlalign_jax import json_files
from vlalign_jax.data.image_processor import ImagePreprocessor
from vlalign_jax.data.picture_tokens import PictureLayout
from vlalign_jax.data.tokens import picture_token
from vlalign_jax.errors import InputError
from vlalign_jax.models.projector import check as check_projector
from vlalign_jax.models.vlm import LANGUAGE, SCORE, ModelConfig
from vlalign_jax.weights import adapters, families, hf_config, sentencepiece_model, tensors

IMAGE_TOKEN = "<image>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclasses.dataclass(frozen=True)
class ModelSource:
  """Describes a model that can be loaded.

  Attributes:
    config: the architecture.
    hf: transformers' config of the model, of one of `families`, with all layers of the source's
      vision tower.
    generation: its generation config.
    tokenizer: has `<image>` and a pad token.
    images: turns pictures into the tower's pixels.
    layout: says which tokens a picture takes.
    tensors: canonical name -> tensor in a file.
    fresh: path prefixes of the parameters that start from random values.
    runs: (run directory, checkpoint step) of the runs that trained the model, oldest first; their
      adapters are merged into the weights.
    start: what the adapters of `config` start from, if they are not fresh.
    new_tokens: whether the model has more tokens than its files, see `assembled`.
    other_files: name -> content of JSON files that exports copy.
  """

  config: ModelConfig
  hf: Any
  generation: GenerationConfig
  tokenizer: Any  # PreTrainedTokenizerBase
  images: ImagePreprocessor
  layout: PictureLayout
  tensors: dict[str, tensors.Tensor]
  fresh: tuple[str, ...] = ()
  runs: tuple[tuple[str, int], ...] = ()
  start: adapters.AdapterInit | None = None
  new_tokens: bool = False
  other_files: dict[str, dict] = dataclasses.field(default_factory=dict)

  @property
  def assembled(self) -> bool:
    """Whether the vocabulary in the files may be smaller than the model's.

    This is so if the model is made of two towers, or is in the layout of LLaVA's original
    repository, whose vocabulary lacks `<image>`.
    """
    return "projector/" in self.fresh or self.new_tokens


def load_tokenizer(directory: str) -> PreTrainedTokenizerBase:
  """Loads the tokenizer of a model directory.

  Raises:
    InputError: it is missing or damaged.
  """
  if not any(os.path.isfile(os.path.join(directory, name)) for name in TOKENIZER_FILES):
    raise InputError(
      f"{directory}: no {' or '.join(TOKENIZER_FILES)} there; copy the tokenizer's files of this "
      "model"
    )
  if sentencepiece_model.stands_alone(directory):
    return _with_chat_template(sentencepiece_model.load(directory), directory)
  try:
    return _with_chat_template(AutoTokenizer.from_pretrained(directory), directory)
  except InputError:
    raise
  except Exception as error:  # on a broken file, transformers and tokenizers may raise anything
    reason = str(error).splitlines()[0]
    if "tiktoken" in reason:  # transformers tries this format last, and its error names it alone
      reason = "tokenizer.model is not a SentencePiece model, and there is no tokenizer.json"
    raise InputError(
      f"{directory}: its tokenizer cannot be loaded ({reason}); copy its files again"
    ) from error


def _with_chat_template(
  tokenizer: PreTrainedTokenizerBase, directory: str
) -> PreTrainedTokenizerBase:
  """Sets the chat template from chat_template.json, where older processors have it, if unset."""
  path = os.path.join(directory, "chat_template.json")
  if not tokenizer.chat_template and (content := json_files.read(path)) is not None:
    if not isinstance(content.get("chat_template"), str):
      raise InputError(f"{path}: chat_template is not a text; correct it, or remove the file")
    tokenizer.chat_template = content["chat_template"]
  return tokenizer


def load_generation(directory: str, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
  """Loads the generation config of a model directory; if there is none, makes a default one.

  Raises:
    InputError: the file cannot be read.
  """
  if os.path.isfile(os.path.join(directory, "generation_config.json")):
    try:
      return GenerationConfig.from_pretrained(directory)
    except (OSError, ValueError, TypeError) as error:
      raise InputError(f"{directory}/generation_config.json cannot be read; correct it") from error
  return GenerationConfig(
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
  )


def with_ends(generation: GenerationConfig, ends: Collection[int]) -> GenerationConfig:
  """Returns the generation config with more ids that end an answer, as a list."""
  ids = generation.eos_token_id
  ids = ids if isinstance(ids, list) else [ids]
  generation = copy.deepcopy(generation)
  generation.eos_token_id = sorted({end for end in (*ids, *ends) if end is not None})
  return generation


def from_parts(
  hf: Any,
  generation: GenerationConfig,
  tokenizer: PreTrainedTokenizerBase,
  images: ImagePreprocessor,
  where: str,
) -> ModelSource:
  """Joins the parts to a model without weights, whose parameters are all fresh.

  Args:
    hf, generation, tokenizer, images: see ModelSource.
    where: name of the model in errors.

  Raises:
    InputError: the parts do not fit together.
  """
  config = _model_config(hf, images, tokenizer, where)
  layout = families.layout_of(hf, config, tokenizer, images, where)
  config = dataclasses.replace(config, most_tiles=layout.most_tiles)
  return ModelSource(
    config=config,
    hf=hf,
    generation=generation,
    tokenizer=_with_pad_token(tokenizer, where),
    images=images,
    layout=layout,
    tensors={},
    fresh=("vision/", "projector/", "language/"),
  )


def _model_config(
  hf: Any, images: ImagePreprocessor, tokenizer: PreTrainedTokenizerBase, where: str
) -> ModelConfig:
  vision, projector, language = hf_config.parts_of(hf, where)
  check_projector(projector, vision, where)
  if (images.height, images.width) != (vision.image_size, vision.image_size):
    raise InputError(
      f"{where}: its image processor makes {images.height} x {images.width} pictures, its vision "
      f"tower takes {vision.image_size} x {vision.image_size}; correct preprocessor_config.json"
    )
  token_id = hf.image_token_id
  token = picture_token(tokenizer)
  if tokenizer.convert_tokens_to_ids(token) != token_id:
    raise InputError(
      f"{where}: config.json says image_token_index {token_id}, the tokenizer has {token} at "
      f"{tokenizer.convert_tokens_to_ids(token)}; correct the wrong one"
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
    image_mean=images.mean,
    image_std=images.std,
    rescale_factor=images.rescale_factor,
    head=SCORE if hf_config.is_reward_model(hf) else LANGUAGE,
    mmca=getattr(hf, "mmca", False),
    family=hf.model_type,
  )


def _with_pad_token(tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
  """Sets a missing pad token to another: padding is never attended to and has no loss."""
  if tokenizer.pad_token_id is None:
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
  if tokenizer.pad_token_id is None:
    raise InputError(f"{where}: the tokenizer has no pad, unk or eos token; give it one")
  return tokenizer
