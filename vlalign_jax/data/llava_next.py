"""The tokens of a picture in LLaVA-NeXT (Liu et al. 2024), which shows it whole and in tiles."""

import dataclasses
import math

import numpy as np

from vlalign_jax.data.picture_tokens import PictureLayout, PictureTokens
from vlalign_jax.image_slots import NEWLINE


@dataclasses.dataclass(frozen=True)
class Pinpoints(PictureLayout):
  """Shows a picture as one tile, and then larger, as a grid of tiles.

  The grid is the one of `pinpoints` that keeps most of the picture's pixels. The picture is in its
  middle, and patches of the empty borders have no tokens ("unpadding"). Each line of patches ends
  with a token of the learned embedding.

  Attributes:
    pinpoints: (height, width) of the grids in pixels, multiples of `tile`.
    tile: the side of a tile in pixels.
  """

  pinpoints: tuple[tuple[int, int], ...]
  tile: int

  @property
  def most_tiles(self) -> int:
    return 1 + max(height * width for height, width in self.pinpoints) // self.tile**2

  def tokens_of(self, size: tuple[int, int] | None) -> PictureTokens:
    assert size is not None
    P, side = self.tokens_per_tile, math.isqrt(self.tokens_per_tile)
    rows, columns = (length // self.tile for length in self._pinpoint(*size))
    tiles = 1 + np.arange(rows * columns).reshape(rows, 1, columns, 1)
    patches = np.arange(P).reshape(1, side, 1, side)
    grid = (tiles * P + patches).reshape(rows * side, columns * side)
    lines = np.pad(_unpadded(grid, *size), ((0, 0), (0, 1)), constant_values=NEWLINE)
    slots = np.concatenate([np.arange(P), lines.reshape(-1)]).astype(np.int32)
    ids = np.full(len(slots), self.image_token_id, np.int32)
    return PictureTokens(ids, slots, 1 + rows * columns, size)

  def _pinpoint(self, width: int, height: int) -> tuple[int, int]:
    """Returns the (height, width) of the grid that a picture of this size gets."""

    def preference(pinpoint: tuple[int, int]) -> tuple[int, int]:
      scale = min(pinpoint[1] / width, pinpoint[0] / height)
      kept = min(int(width * scale) * int(height * scale), width * height)
      return kept, kept - math.prod(pinpoint)  # of the pixels, and with the least around them

    return max(self.pinpoints, key=preference)  # of several that are equal, the first


def _unpadded(grid: np.ndarray, width: int, height: int) -> np.ndarray:
  """Cuts the borders off a grid [rows, columns] of patches that a picture does not fill.

  Args:
    grid: of any values.
    width, height: of the picture in pixels.
  """
  rows, columns = grid.shape
  if width / height > columns / rows:
    border = (rows - int(round(height * (columns / width), 7))) // 2
    return grid[border : rows - border]
  border = (columns - int(round(width * (rows / height), 7))) // 2
  return grid[:, border : columns - border]
