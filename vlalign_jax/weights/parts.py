"""What is opened of a model before its weights are read: config, tokenizer, pictures."""

import copy
import dataclasses
import os
from collections.abc import Collection

from transformers import AutoTokenizer, GenerationConfig, LlavaConfig, PreTrainedTokenizerBase

from vlalign_jax import json_files
from vlalign_jax.data.images import ImagePreprocessor
from vlalign_jax.errors import InputError
from vlalign_jax.models.projector import check as check_projector
from vlalign_jax.models.vlm import LANGUAGE, SCORE, ModelConfig
from vlalign_jax.weights import adapters, hf_config, sentencepiece_model, tensors

IMAGE_TOKEN = "<image>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclasses.dataclass(frozen=True)
class ModelSource:
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
    new_tokens: whether the model has more tokens than its files, see `assembled`.
  """

  config: ModelConfig
  hf: LlavaConfig
  generation: GenerationConfig
  tokenizer: PreTrainedTokenizerBase
  images: ImagePreprocessor
  tensors: dict[str, tensors.Tensor]
  fresh: tuple[str, ...] = ()
  runs: tuple[tuple[str, int], ...] = ()
  start: adapters.AdapterInit | None = None
  new_tokens: bool = False

  @property
  def assembled(self) -> bool:
    """Whether it is made of two towers, whose vocabulary may be smaller than the model's.

    A model in LLaVA's own layout, whose vocabulary has no `<image>`, counts as one.
    """
    return "projector/" in self.fresh or self.new_tokens


def load_tokenizer(directory: str) -> PreTrainedTokenizerBase:
  """The tokenizer of a model directory.

  Raises:
    InputError: there is none, or it is damaged.
  """
  if not any(os.path.isfile(os.path.join(directory, name)) for name in TOKENIZER_FILES):
    raise InputError(
      f"{directory}: no {' or '.join(TOKENIZER_FILES)} there; copy the tokenizer's files from the "
      "model that this is"
    )
  if sentencepiece_model.stands_alone(directory):
    return _with_chat_template(sentencepiece_model.load(directory), directory)
  try:
    return _with_chat_template(AutoTokenizer.from_pretrained(directory), directory)
  except InputError:
    raise
  except Exception as error:  # transformers and tokenizers raise nearly anything on a broken file
    reason = str(error).splitlines()[0]
    if "tiktoken" in reason:  # what transformers tries next, and what it then asks for
      reason = "tokenizer.model is not a SentencePiece model, and there is no tokenizer.json"
    raise InputError(
      f"{directory}: its tokenizer cannot be loaded ({reason}); copy its files again"
    ) from error


def _with_chat_template(
  tokenizer: PreTrainedTokenizerBase, directory: str
) -> PreTrainedTokenizerBase:
  """Takes the chat template of older processors, chat_template.json, where there is no other."""
  path = os.path.join(directory, "chat_template.json")
  if not tokenizer.chat_template and (content := json_files.read(path)) is not None:
    if not isinstance(content.get("chat_template"), str):
      raise InputError(f"{path}: has no text under chat_template; correct it, or remove the file")
    tokenizer.chat_template = content["chat_template"]
  return tokenizer


def load_generation(directory: str, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
  """The generation config of a model directory, or what its tokenizer says of it.

  Raises:
    InputError: the file there cannot be read.
  """
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


def with_ends(generation: GenerationConfig, ends: Collection[int]) -> GenerationConfig:
  """Returns the generation config with ids more that end an answer, as a list."""
  own = generation.eos_token_id
  own = own if isinstance(own, list) else [own]
  generation = copy.deepcopy(generation)
  generation.eos_token_id = sorted({end for end in (*own, *ends) if end is not None})
  return generation


def from_parts(
  hf: LlavaConfig,
  generation: GenerationConfig,
  tokenizer: PreTrainedTokenizerBase,
  images: ImagePreprocessor,
  where: str,
) -> ModelSource:
  """A model without weights; every parameter of it is fresh.

  Args:
    hf, generation, tokenizer, images: see ModelSource.
    where: what to call the model in errors.

  Raises:
    InputError: the parts do not fit together.
  """
  return ModelSource(
    config=_model_config(hf, images, tokenizer, where),
    hf=hf,
    generation=generation,
    tokenizer=_with_pad_token(tokenizer, where),
    images=images,
    tensors={},
    fresh=("vision/", "projector/", "language/"),
  )


def _model_config(
  hf: LlavaConfig, images: ImagePreprocessor, tokenizer: PreTrainedTokenizerBase, where: str
) -> ModelConfig:
  vision, projector, language = hf_config.parts_of(hf, where)
  check_projector(projector, vision, where)
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
    mmca=getattr(hf, "mmca", False),
  )


def _with_pad_token(tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
  """Padding never reaches a loss or an attended position, so any existing token will do."""
  if tokenizer.pad_token_id is None:
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
  if tokenizer.pad_token_id is None:
    raise InputError(f"{where}: the tokenizer has no pad, unk or eos token; give it one")
  return tokenizer
