"""examples.html: the first examples of a run as its model reads them, learned text marked."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from vlalign_jax import html
from vlalign_jax.data.conversations import IMAGE_PLACEHOLDER
from vlalign_jax.data.encode import Example
from vlalign_jax.image_slots import TEXT
from vlalign_jax.input_pipeline.prepare import LoadExample, Prepared

FILE = "examples.html"
SHOWN = 10


def page(prepared: Prepared) -> str:
  """Returns HTML of the first SHOWN = 10 different examples of a plan, with their pictures."""
  load: Any = prepared.load_example
  images: Any = prepared.load_image
  numbers = [int(number) for number in dict.fromkeys(prepared.plan.examples)][:SHOWN]
  lines = [
    f'<p class="label">The first {len(numbers)} of {prepared.records} examples; <mark>marked</mark>'
    " is what the model learns to say.</p>"
  ]
  if images.blank:
    lines.append('<p class="label">data.blank_images: the model sees gray instead.</p>')
  lines += [section(load, load(number)) for number in numbers]
  return html.page("What the model learns from", lines)


def section(load: LoadExample, example: Example) -> str:
  """Returns HTML of an example as the model reads it, with its pictures."""
  size = f"{len(example.tokens)} tokens, {int(example.loss_mask.sum())} learned"
  texts = [
    f"<p>{_marked(parts)}</p>"
    for parts in parts_of(example, load.tokenizer, load.layout.image_token_id)
  ]
  label = f'<p class="label">{html.text(example.where)}: {size}</p>'
  pictures = html.pictures(example.images)
  return f"<section>{pictures}<div>{label}{''.join(texts)}</div></section>"


def parts_of(example: Example, tokenizer, image_token_id: int) -> Iterator[list[tuple[str, bool]]]:
  """Yields the texts of an example: the conversation, or the prompt and then its ranked answers.

  Args:
    example: tokenized.
    tokenizer: that made its tokens.
    image_token_id: of the model.

  Yields:
    Consecutive pieces of a text, each with whether it is learned.
  """
  learned = np.append(False, example.loss_mask[:-1] > 0)
  texts = [example.branches == 0]
  if len(example.answers):  # each begins with a copy of the prompt's last token
    firsts = np.flatnonzero(np.diff(example.branches, prepend=0))
    texts[0] = texts[0] | (np.arange(len(learned)) == firsts[0])
    rest = ~np.isin(np.arange(len(learned)), firsts)
    texts += [rest & (example.branches == k + 1) for k in range(len(example.answers))]
  sizes = [int(np.sum(picture.slots != TEXT)) for picture in example.pictures]
  for chosen in texts:
    tokens, marks = example.tokens[chosen], learned[chosen]
    pieces, ids, before = [], [], ""
    pictures = tokens == image_token_id
    for (mark, picture), group in itertools.groupby(
      zip(marks, pictures, tokens, strict=True), _kind
    ):
      found = [int(token) for *_, token in group]
      if picture:
        pieces.append((IMAGE_PLACEHOLDER * _take(sizes, len(found)), bool(mark)))
        continue
      # What a token reads as may depend on those before it.
      ids += found
      text = tokenizer.decode(ids, skip_special_tokens=False)
      pieces.append((text[len(before) :], bool(mark)))
      before = text
    yield pieces


def _take(sizes: list[int], tokens: int) -> int:
  """Takes image tokens from those that pictures have left; returns of how many pictures."""
  pictures = 0
  while tokens:
    taken = min(tokens, sizes[0])
    tokens -= taken
    sizes[0] -= taken
    pictures += 1
    if not sizes[0]:
      sizes.pop(0)
  return pictures


def _kind(token) -> tuple[bool, bool]:
  return token[0], token[1]


def _marked(pieces: list[tuple[str, bool]]) -> str:
  return "".join(
    f"<mark>{html.text(text)}</mark>" if learned else html.text(text) for text, learned in pieces
  )
