"""Conversations for tests of templates, and how their pieces are compared."""

from vlalign_jax.data.conversations import Turn
from vlalign_jax.data.templates import Piece

WHERE = 'data/train.json, record 3 ("id": "x")'


ONE = (Turn("<image>\nWhat is it?", "A cat."),)
TEXT_ONLY = (Turn("What is it?", "A cat."),)
TWO = (
  Turn("Compare  <image> and <image>.", " Same.\n"),
  Turn("Why?", "Look."),
  Turn("\nAnd <image>", "No"),
)


def alternating(texts: list[str]) -> list[Piece]:
  return [Piece(text, learn=bool(number % 2)) for number, text in enumerate(texts)]


def unanswered(turns) -> tuple[Turn, ...]:
  return (*turns[:-1], Turn(turns[-1].human, None))
