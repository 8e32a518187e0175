"""Loads a tokenizer.model, a SentencePiece model, that comes without other tokenizer files.

transformers would leave out the bos token, and the space that SentencePiece puts before a text.
Here every text gets both, as in LLaMA, and its ids are those of the sentencepiece library.
"""

import os
from typing import Any

import sentencepiece
from tokenizers import normalizers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlalign_jax import json_files
from vlalign_jax.errors import InputError

FILE = "tokenizer.model"
_CONFIGS = ("tokenizer.json", "tokenizer_config.json")
_PROBES = ("A cat and two dogs.", "  two  spaces ", "é ﬁ ½ 猫 🙂\n\ta line", "12 + 30 = 42")


def stands_alone(directory: str) -> bool:
  """Returns whether a directory has a tokenizer.model and no config that says how to use it."""
  exist = [os.path.isfile(os.path.join(directory, name)) for name in (FILE, *_CONFIGS)]
  return exist == [True, False, False]


def load(directory: str) -> PreTrainedTokenizerBase:
  """Loads the tokenizer of such a directory, with the tokens of added_tokens.json if it exists.

  Raises:
    InputError: it is damaged, lacks bos, eos or unk, or has rules that LLaMA's tokenizer lacks.
  """
  path = os.path.join(directory, FILE)
  try:
    model = sentencepiece.SentencePieceProcessor(model_file=path)
  except (OSError, RuntimeError) as error:
    raise InputError(
      f"{directory}: {FILE} is not a SentencePiece model, and there is no tokenizer.json; copy the "
      "tokenizer's files again"
    ) from error
  ends = {"unk_token": model.unk_id(), "bos_token": model.bos_id(), "eos_token": model.eos_id()}
  if min(ends.values()) < 0:
    raise InputError(f"{path}: {_missing(ends)}; copy the tokenizer's other files next to it")
  tokens: Any = {name: model.id_to_piece(index) for name, index in ends.items()}
  backend = LlamaTokenizer.from_pretrained(
    directory, add_bos_token=True, **tokens
  ).backend_tokenizer
  # As in Llama 2's tokenizer.json: the space is added even where a text begins with one.
  backend.pre_tokenizer = None
  backend.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, clean_up_tokenization_spaces=False, **tokens
  )
  for text in _PROBES:
    if tokenizer(text)["input_ids"] != [model.bos_id(), *model.encode(text)]:
      raise InputError(
        f"{path} has rules that LLaMA's tokenizer lacks ({text!r} becomes other tokens); save a "
        "tokenizer.json next to it (save_pretrained of AutoTokenizer does)"
      )
  _add_tokens(tokenizer, os.path.join(directory, "added_tokens.json"))
  return tokenizer


def _missing(ends: dict[str, int]) -> str:
  return f"it has no {' and no '.join(name for name, index in ends.items() if index < 0)}"


def _add_tokens(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
  added = json_files.read(path) or {}
  for text, index in sorted(added.items(), key=lambda item: item[1]):
    tokenizer.add_tokens([text], special_tokens=True)
    if tokenizer.convert_tokens_to_ids(text) != index:
      raise InputError(f"{path}: {text!r} cannot have the id {index}; correct it")
