"""Brings the `<image>` placeholders of a record's questions and its pictures together."""

from dataclasses import replace

from vlalign_jax.data import pictures
from vlalign_jax.data.conversations import IMAGE_PLACEHOLDER, Conversation, Turn
from vlalign_jax.data.picture_store import PictureStore
from vlalign_jax.errors import InputError

# What is done where they do not match: refuse the record, or put all pictures first.
PLACEHOLDERS = ("match", "first")


def place_images(
  conversation: Conversation,
  images: tuple[str, ...],
  placeholders: str,
  root: str,
  store: PictureStore,
) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
  """Returns the turns and the images of their placeholders, one each.

  Args:
    conversation: of the record; its messages may hold pictures.
    images: that the record names next to its messages.
    placeholders: one of PLACEHOLDERS.
    root, store: as for `pictures.locate`.

  Raises:
    InputError: placeholders and images do not match, or a message's picture cannot be used.
  """
  turns = conversation.turns
  # A message's part may hold its picture; the record's own pictures fill the other placeholders.
  own = [
    None if value is None else pictures.locate(value, "a message's part", root, store)
    for value in conversation.pictures
  ]
  held = tuple(image for image in own if image is not None)
  open_places = len(own) - len(held)
  if open_places == len(images):
    rest = iter(images)
    return turns, tuple(next(rest) if image is None else image for image in own)
  if open_places and placeholders != "first":
    number = len(images) + len(held)
    raise InputError(
      f"its questions hold {len(own)} {IMAGE_PLACEHOLDER} but it has {number}"
      f" {'image' if number == 1 else 'images'}; make them agree, or set data.placeholders=first"
      " to put all images first"
    )
  before = len(images)
  if open_places:  # taken out
    turns = tuple(replace(turn, human=_without_placeholders(turn.human)) for turn in turns)
    before += len(held)
  first = replace(turns[0], human=f"{IMAGE_PLACEHOLDER}\n" * before + turns[0].human)
  return (first, *turns[1:]), images + held


def _without_placeholders(text: str) -> str:
  return text.replace(f"{IMAGE_PLACEHOLDER}\n", "").replace(IMAGE_PLACEHOLDER, "").strip()
