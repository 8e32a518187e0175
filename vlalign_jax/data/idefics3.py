"""The tokens of a picture in Idefics3 and SmolVLM, which show it in tiles and whole.

Laurençon et al. 2024, "Building and better understanding vision-language models"; Marafioti et al.
2025, "SmolVLM".
"""

import dataclasses
import math

import numpy as np

from vlalign_jax.data.picture_tokens import PictureLayout, PictureTokens
from vlalign_jax.image_slots import TEXT

Ids = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MarkedGrid(PictureLayout):
  """Shows a picture as rows of tiles, and then as one tile; marks before each name its place.

  The picture is enlarged or reduced to `longest` pixels, and then stretched to whole tiles.

  Attributes:
    longest: pixels of the longer side; None: as the picture has them.
    tile: the side of a tile in pixels.
    splits: whether pictures are cut; if not, each is one tile.
    places: ids before the tile of each row and column; the first column's begin the row.
    row_end: ids between rows.
    whole_after_grid: ids between the last row and the whole picture.
    whole: ids before a whole picture that is alone.
    end: ids after the whole picture.
  """

  longest: int | None
  tile: int
  splits: bool
  places: tuple[tuple[Ids, ...], ...]
  row_end: Ids
  whole_after_grid: Ids
  whole: Ids
  end: Ids

  @property
  def most_tiles(self) -> int:
    return 1 + len(self.places) ** 2 * self.splits

  def tokens_of(self, size: tuple[int, int] | None) -> PictureTokens:
    assert size is not None
    rows, columns = self._grid(*size)
    before = [  # each tile
      (self.row_end if row and not column else ()) + self.places[row][column]
      for row in range(rows)
      for column in range(columns)
    ]
    before.append(self.whole_after_grid if rows else self.whole)
    P, ids, slots = self.tokens_per_tile, [], []
    for tile, marks in enumerate(before):
      ids += [np.array(marks), np.full(P, self.image_token_id)]
      slots += [np.full(len(marks), TEXT), np.arange(tile * P, (tile + 1) * P)]
    ids.append(np.array(self.end))
    slots.append(np.full(len(self.end), TEXT))
    ids, slots = np.concatenate(ids), np.concatenate(slots)
    return PictureTokens(ids.astype(np.int32), slots.astype(np.int32), len(before), size)

  def _grid(self, width: int, height: int) -> tuple[int, int]:
    """Returns (rows, columns) of a picture of this size; (0, 0) if it is not cut."""
    if not self.splits:
      return 0, 0
    if self.longest is not None:
      width, height = scaled(width, height, self.longest)
    # The longer side first: the other one follows from its rounded length.
    if width >= height:
      columns = math.ceil(width / self.tile)
      rows = math.ceil(int(columns * self.tile / (width / height)) / self.tile)
    else:
      rows = math.ceil(height / self.tile)
      columns = math.ceil(int(rows * self.tile * (width / height)) / self.tile)
    return (rows, columns) if max(rows, columns) > 1 else (0, 0)


LARGEST = 4096  # pixels of a side


def scaled(width: int, height: int, longest: int) -> tuple[int, int]:
  """Returns (width, height) of a picture whose longer side has been scaled; the other is even."""
  ratio = width / height
  if width >= height:
    width, height = longest, int(longest / ratio)
    height += height % 2
  else:
    width, height = int(longest * ratio), longest
    width += width % 2
  width, height = max(width, 1), max(height, 1)
  ratio = width / height
  if width >= height and width > LARGEST:
    width, height = LARGEST, int(LARGEST / ratio)
  elif height > width and height > LARGEST:
    width, height = int(LARGEST * ratio), LARGEST
  return max(width, 1), max(height, 1)
