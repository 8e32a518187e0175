"""Tokenizes text piece by piece, so that learned and other text never share a token."""

import copy
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from vlalign_jax.data.conversations import IMAGE_PLACEHOLDER
from vlalign_jax.errors import InputError

# A Unicode noncharacter: the texts on its two sides are tokenized separately, and it is not.
CUT = "\ufdd0"

# Stand-ins for the text before a piece, for when the piece would merge with the real text.
ANCHORS = (":", "\n", "a", "1", ".", " ")


@dataclass(frozen=True, eq=False)
class Vocabulary:
  """Facts about a tokenizer that encoding needs for every record, computed once."""

  backend: Tokenizer  # a copy, without truncation and padding
  added: frozenset[str]  # tokens, special or not, that are split off before the rest is tokenized
  endings: tuple[str, ...]  # the same texts, longest first
  control: re.Pattern  # tokens that only a template may write
  prefix: list[int]  # what the tokenizer itself puts before a text: bos or nothing
  unknown: int | None
  picture: str  # the token that stands for a picture, which texts have as <image>
  anchors: dict[str, list[int]] = field(default_factory=dict)

  def ids(self, text: str) -> list[int]:
    """Returns the ids of `text` alone, without bos and eos."""
    text = text.replace(IMAGE_PLACEHOLDER, self.picture)
    return self.backend.encode(text, add_special_tokens=False).ids


def picture_token(tokenizer) -> str:
  """Returns the token that stands for a picture: <image>, or InternVL's own."""
  return getattr(tokenizer, "context_image_token", None) or IMAGE_PLACEHOLDER


def vocabulary(tokenizer) -> Vocabulary:
  """Returns the `Vocabulary` of a fast tokenizer, cached until tokens are added to it."""
  return _vocabulary(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=16)
def _vocabulary(tokenizer, size: int) -> Vocabulary:
  del size  # only a part of the cache's key
  if not getattr(tokenizer, "is_fast", False):
    raise InputError(
      f"{tokenizer.name_or_path or 'the tokenizer'} has no fast tokenizer; save one next to it"
      " (tokenizer.json)"
    )
  backend = copy.deepcopy(tokenizer.backend_tokenizer)
  backend.no_truncation()
  backend.no_padding()
  tokens = tokenizer.added_tokens_decoder.values()
  added = frozenset(token.content for token in tokens)
  # Added tokens that are not special (runs of spaces, <think>) are ordinary words.
  control = {token.content for token in tokens if token.special}
  control |= {*tokenizer.all_special_tokens, IMAGE_PLACEHOLDER}
  probe = backend.encode("a", add_special_tokens=True)
  before = 0
  while before < len(probe.ids) and probe.special_tokens_mask[before]:
    before += 1
  return Vocabulary(
    backend=backend,
    added=added,
    endings=tuple(sorted(added | {IMAGE_PLACEHOLDER}, key=len, reverse=True)),
    control=re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True)))),
    prefix=probe.ids[:before],
    unknown=tokenizer.unk_token_id,
    picture=picture_token(tokenizer),
  )


def plain_text(text: str, tokenizer) -> str:
  """Returns a question or an answer so that no word of it becomes a control token.

  Data from the web contains `</s>` and the like as words. Each such word gets a `CUT` after its
  first character, so that it is tokenized as separate characters.
  """
  text = text.replace(CUT, "")
  control = vocabulary(tokenizer).control
  if control.search(text) is None:
    return text
  return re.sub(f"(?=(?:{control.pattern}))(.)", rf"\1{CUT}", text, flags=re.DOTALL)


def tokenize_pieces(texts: Sequence[str], tokenizer) -> list[np.ndarray]:
  """Tokenizes the consecutive pieces of one text, each exactly once.

  The first piece gets what the tokenizer itself puts before a text (bos), unless it begins with it.
  A later piece is tokenized as a continuation: after an anchor, whose ids are then removed.
  Without one, SentencePiece-style tokenizers would put a space before every piece.

  Args:
    texts: the pieces, in order.
    tokenizer: a fast Hugging Face tokenizer.

  Returns:
    One int32[N] array of ids per piece; concatenated they are the ids of the text.
  """
  return _tokenize(texts, None, vocabulary(tokenizer))[0]


def tokenize_branches(
  trunk: Sequence[str], branches: Sequence[Sequence[str]], tokenizer
) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
  """Tokenizes texts that begin alike, as `tokenize_pieces` does; the shared beginning only once.

  Args:
    trunk: the pieces that all texts begin with.
    branches: the pieces after the trunk, for each text.
    tokenizer: a fast Hugging Face tokenizer.

  Returns:
    (ids of the trunk's pieces, ids of each branch's pieces).
  """
  words = vocabulary(tokenizer)
  ids, before = _tokenize(trunk, None, words)
  return ids, [_tokenize(branch, before, words)[0] for branch in branches]


def _tokenize(
  texts: Sequence[str], before: str | None, words: Vocabulary
) -> tuple[list[np.ndarray], str | None]:
  """Returns (ids of each piece, the last text), after the text `before` if there is one."""
  arrays = []
  for text in texts:
    ids = []
    for part in text.split(CUT):
      if part:
        ids += _first(part, words) if before is None else _continuation(part, before, words)
        before = part
    arrays.append(np.array(ids, np.int32))
  return arrays, before


def _first(text: str, words: Vocabulary) -> list[int]:
  ids = words.ids(text)
  return ids if ids[: len(words.prefix)] == words.prefix else words.prefix + ids


def _continuation(text: str, before: str, words: Vocabulary) -> list[int]:
  special = next((token for token in words.endings if before.endswith(token)), None)
  for anchor in (before[-1] if special is None else special, *ANCHORS):
    head = words.anchors.get(anchor)
    if head is None:
      head = words.anchors[anchor] = words.ids(anchor)
    if anchor != special and words.unknown in head:
      continue  # unknown characters may be fused with the next ones
    ids = words.ids(anchor + text)
    if ids[: len(head)] == head:
      return ids[len(head) :]
  return words.ids(text)
