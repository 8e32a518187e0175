"""Loads the tokenizer of a checkpoint of Vision-LLM-Alignment.

The original adds two tokens, the heading `### Image:` and `<image>`. In a prompt it replaces the
heading's token by the tokens of the words `### Image 1:`, so the heading's embedding is never
trained. Here the heading's token is renamed, so that the tokenizer splits a heading into words.
"""

import os
import shutil
import tempfile

from transformers import PreTrainedTokenizerBase

from vlalign_jax.weights.parts import IMAGE_TOKEN, TOKENIZER_FILES, load_tokenizer

_HEADING, _UNNAMED, _PAD = "### Image:", "<unused image heading>", "<PAD>"


def load(directory: str, language: str) -> PreTrainedTokenizerBase:
  """Returns the tokenizer that a checkpoint was trained with.

  Args:
    directory: of the checkpoint.
    language: directory of the language model. If the checkpoint has no tokenizer, this one gets the
      tokens that the original adds, in the same order.

  Raises:
    InputError: the tokenizer is missing or damaged.
  """
  if any(os.path.isfile(os.path.join(directory, name)) for name in TOKENIZER_FILES):
    tokenizer = load_tokenizer(directory)
    return _load_renamed(directory) if _HEADING in tokenizer.get_vocab() else tokenizer
  tokenizer = load_tokenizer(language)
  tokenizer.add_tokens([_UNNAMED, IMAGE_TOKEN], special_tokens=True)
  if tokenizer.pad_token is None:
    tokenizer.add_special_tokens({"pad_token": _PAD})
  return tokenizer


def _load_renamed(directory: str) -> PreTrainedTokenizerBase:
  """Loads a copy of the tokenizer's files in which the heading's token has another name."""
  with tempfile.TemporaryDirectory() as copy:
    for name in os.listdir(directory):
      path, target = os.path.join(directory, name), os.path.join(copy, name)
      if name.endswith(".json"):
        with open(path, encoding="utf-8") as file:
          text = file.read().replace(f'"{_HEADING}"', f'"{_UNNAMED}"')
        with open(target, "w", encoding="utf-8") as file:
          file.write(text)
      elif name in TOKENIZER_FILES or name.endswith(".jinja"):
        shutil.copy(path, target)
    return load_tokenizer(copy)
