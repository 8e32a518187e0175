"""The tokens of a picture in InternVL (Chen et al. 2024), which shows it in tiles and whole."""

import dataclasses
import math

import numpy as np

from vlalign_jax.data.picture_tokens import PictureLayout, PictureTokens
from vlalign_jax.image_slots import TEXT


@dataclasses.dataclass(frozen=True)
class ClosestGrid(PictureLayout):
  """Shows a picture as the grid of tiles that is closest to its shape, and then as one tile.

  The picture is stretched to the grid. A grid of one tile is not followed by another. All
  embeddings stand between two marks.

  Attributes:
    least, most: tiles of a grid.
    tile: the side of a tile in pixels.
    start_id, end_id: ids of the marks.
  """

  least: int
  most: int
  tile: int
  start_id: int
  end_id: int

  @property
  def most_tiles(self) -> int:
    return self.most + (self.most > 1)

  def tokens_of(self, size: tuple[int, int] | None) -> PictureTokens:
    assert size is not None
    tiles = math.prod(self._grid(*size))
    tiles += tiles > 1
    slots = np.pad(np.arange(tiles * self.tokens_per_tile), 1, constant_values=TEXT)
    ids = np.full(len(slots), self.image_token_id, np.int32)
    ids[0], ids[-1] = self.start_id, self.end_id
    return PictureTokens(ids, slots.astype(np.int32), tiles, size)

  def _grid(self, width: int, height: int) -> tuple[int, int]:
    """Returns (columns, rows) of the grid of a picture of this size."""
    sides = range(1, self.most + 1)
    grids = [(columns, rows) for columns in sides for rows in sides]
    grids = [grid for grid in grids if self.least <= math.prod(grid) <= self.most]
    best, distance = (1, 1), math.inf
    for columns, rows in sorted(grids, key=math.prod):
      other = abs(width / height - columns / rows)
      # Of equal shapes, more tiles only for a picture that fills at least half of them.
      fills = width * height > 0.5 * self.tile**2 * columns * rows
      if other < distance or (other == distance and fills):
        best, distance = (columns, rows), other
    return best
