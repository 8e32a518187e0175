"""The tokenizer of a checkpoint of Vision-LLM-Alignment, made to read its prompts as it did.

It adds the heading `### Image:` as a token beside `<image>`, finds it in a prompt, and puts the
tokens of the words `### Image 1:` in its place, so that the heading's own embedding is never
trained. Here prompts are tokenised as they stand: the token gives up its name, and the heading is
words.
"""

import os
import shutil
import tempfile

from transformers import PreTrainedTokenizerBase

from vlalign_jax.weights.parts import IMAGE_TOKEN, TOKENIZER_FILES, load_tokenizer

_HEADING, _UNNAMED, _PAD = "### Image:", "<unused image heading>", "<PAD>"


def load(directory: str, language: str) -> PreTrainedTokenizerBase:
  """The tokenizer that a checkpoint was trained with.

  Args:
    directory: of the checkpoint.
    language: of the language model; if the checkpoint has no tokenizer, this one gets the tokens
      that the original adds, in its order.

  Raises:
    InputError: there is none, or it is damaged.
  """
  if any(os.path.isfile(os.path.join(directory, name)) for name in TOKENIZER_FILES):
    found = load_tokenizer(directory)
    return _renamed(directory) if _HEADING in found.get_vocab() else found
  found = load_tokenizer(language)
  found.add_tokens([_UNNAMED, IMAGE_TOKEN], special_tokens=True)
  if found.pad_token is None:
    found.add_special_tokens({"pad_token": _PAD})
  return found


def _renamed(directory: str) -> PreTrainedTokenizerBase:
  with tempfile.TemporaryDirectory() as renamed:
    for name in os.listdir(directory):
      path, copied = os.path.join(directory, name), os.path.join(renamed, name)
      if name.endswith(".json"):
        with open(path, encoding="utf-8") as file:
          text = file.read().replace(f'"{_HEADING}"', f'"{_UNNAMED}"')
        with open(copied, "w", encoding="utf-8") as file:
          file.write(text)
      elif name in TOKENIZER_FILES or name.endswith(".jinja"):
        shutil.copy(path, copied)
    return load_tokenizer(renamed)
