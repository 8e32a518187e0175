"""The tokens that a picture takes in a prompt, and the embedding that stands at each of them."""

import abc
import dataclasses
from typing import ClassVar

import numpy as np

from vlalign_jax.data import images
from vlalign_jax.data.records import Record
from vlalign_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class PictureTokens:
  """The tokens of a picture, which is cut into equal tiles.

  Attributes:
    ids: int32[N], the image token's id where an embedding stands.
    slots: int32[N], index into the picture's own embeddings [tiles * P], or one of
      `image_slots`.
    tiles: the number of its tiles.
    size: (width, height) that this is for; None: the size of the picture changes nothing.
  """

  ids: np.ndarray
  slots: np.ndarray
  tiles: int = 1
  size: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class PictureLayout(abc.ABC):
  """How a model shows pictures; each kind has a class.

  Attributes:
    image_token_id: the id that marks embeddings of pictures.
    tokens_per_tile: P, embeddings of a tile.
  """

  image_token_id: int
  tokens_per_tile: int
  by_size: ClassVar[bool] = True  # whether the tokens depend on the picture's size

  @property
  @abc.abstractmethod
  def most_tiles(self) -> int:
    """Returns the most tiles that a picture may have."""

  @abc.abstractmethod
  def tokens_of(self, size: tuple[int, int] | None) -> PictureTokens:
    """Returns the tokens of a picture of size (width, height); None unless `by_size`."""


@dataclasses.dataclass(frozen=True)
class OneTile(PictureLayout):
  """Shows every picture as one tile: LLaVA."""

  by_size: ClassVar[bool] = False

  @property
  def most_tiles(self) -> int:
    return 1

  def tokens_of(self, size: tuple[int, int] | None) -> PictureTokens:
    ids = np.full(self.tokens_per_tile, self.image_token_id, np.int32)
    return PictureTokens(ids, np.arange(self.tokens_per_tile, dtype=np.int32))


def tokens_of_record(record: Record, layout: PictureLayout) -> tuple[PictureTokens, ...]:
  """Returns the tokens of each of a record's pictures.

  Args:
    record: with `image_sizes`, if the layout depends on sizes.
    layout: of the model.

  Raises:
    InputError: a picture cannot be read.
  """
  if not layout.by_size:
    return (layout.tokens_of(None),) * len(record.images)
  sizes = record.image_sizes or (None,) * len(record.images)
  try:
    return tuple(
      layout.tokens_of(size or images.size(path))
      for path, size in zip(record.image_files, sizes, strict=True)
    )
  except InputError as error:
    raise InputError(f"{record.where}: {error}") from error
