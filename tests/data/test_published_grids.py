"""Numbers of tiles and tokens of pictures of any size, at published sizes, equal transformers'."""

import numpy as np
import pytest
import transformers
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
  LlavaNextImageProcessorPil,
)

from tests import tiny_models
from vlalign_jax.data.idefics3 import MarkedGrid
from vlalign_jax.data.internvl import ClosestGrid
from vlalign_jax.data.llava_next import Pinpoints
from vlalign_jax.image_slots import TEXT

IMAGE = 9
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def sizes(number: int = 1500):
  """Yields (width, height), many of them of equal sides, whole tiles, or extreme shapes."""
  rng = np.random.default_rng(0)
  sides = (336, 364, 384, 448, 512, 672, 896, 1008, 1, 2, 3, 4095, 4096, 4097, 6000)
  for _ in range(number):
    drawn = [int(2 ** rng.uniform(0, 12.3)), int(rng.choice(sides)), int(rng.integers(1, 1500))]
    yield int(rng.choice(drawn)), int(rng.choice(drawn))


def test_llava_next():
  layout = Pinpoints(IMAGE, 576, PINPOINTS, 336)
  square = {"height": 336, "width": 336}
  images = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=square)
  processor = transformers.LlavaNextProcessor(
    images, tiny_models.make_tokenizer(), 14, "default", num_additional_image_tokens=1
  )
  for width, height in sizes():
    expected = processor._get_num_multimodal_tokens([(height, width)]).num_image_tokens[0]
    tokens = layout.tokens_of((width, height))
    assert len(tokens.ids) == expected, (width, height)
    assert tokens.tiles <= layout.most_tiles == 5


@pytest.mark.parametrize(("least", "most"), [(1, 12), (1, 6), (3, 9), (1, 1)])
def test_internvl(least, most):
  layout = ClosestGrid(IMAGE, 4, least, most, 448, 7, 8)
  square = {"height": 448, "width": 448}
  images = GotOcr2ImageProcessorPil(size=square, min_patches=least, max_patches=most)
  for width, height in sizes(500):
    options = {"crop_to_patches": True}
    expected = images.get_number_of_image_patches(height, width, options)
    tokens = layout.tokens_of((width, height))
    assert tokens.tiles == expected <= layout.most_tiles, (width, height)
    assert len(tokens.ids) == 2 + 4 * expected


@pytest.mark.parametrize(
  ("longest", "tile"), [(1456, 364), (1536, 384), (2048, 512), (1820, 364), (512, 512)]
)
def test_idefics3(longest, tile):
  side = -(-longest // tile)
  places = tuple(tuple((row, column) for column in range(side)) for row in range(side))
  marks = {"row_end": (50,), "whole_after_grid": (51,), "whole": (52,), "end": (53,)}
  layout = MarkedGrid(IMAGE, 1, longest, tile, True, places, **marks)
  images = Idefics3ImageProcessorPil(
    size={"longest_edge": longest}, max_image_size={"longest_edge": tile}
  )
  for width, height in sizes():
    tiles, rows, columns = images.get_number_of_image_patches(height, width)
    tiles = tiles or 1  # it says 0 of a picture that is not cut
    tokens = layout.tokens_of((width, height))
    assert tokens.tiles == tiles <= layout.most_tiles, (width, height)
    expected = []
    for row in range(rows):
      for column in range(columns):
        expected += [50] * (row > 0 and column == 0) + [row, column, IMAGE]
    expected += [51 if rows else 52, IMAGE, 53]
    assert tokens.ids.tolist() == expected, (width, height)
    np.testing.assert_array_equal(tokens.slots[tokens.slots != TEXT], np.arange(tiles))


def test_pictures_that_are_not_cut():
  marks = {"row_end": (50,), "whole_after_grid": (51,), "whole": (52,), "end": (53,)}
  layout = MarkedGrid(IMAGE, 2, 1456, 364, False, (), **marks)
  assert layout.most_tiles == 1
  tokens = layout.tokens_of((3000, 1000))
  assert (tokens.ids.tolist(), tokens.tiles) == ([52, IMAGE, IMAGE, 53], 1)
