"""Tests rows of pictures that are cut into tiles, whose number depends on the picture's size."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from tests import tiny_models
from tests.data import pipelines
from vlalign_jax.data import images
from vlalign_jax.data.conversations import Turn
from vlalign_jax.data.encode import encode
from vlalign_jax.data.picture_tokens import PictureLayout, PictureTokens
from vlalign_jax.data.plan import ImageSets, plan_batches, statistics
from vlalign_jax.data.records import Record
from vlalign_jax.data.rows import build_row
from vlalign_jax.errors import InputError
from vlalign_jax.image_slots import NEWLINE, TEXT
from vlalign_jax.input_pipeline import picture_sizes

MARKER = 5


@dataclasses.dataclass(frozen=True)
class Columns(PictureLayout):
  """Cuts a picture into a tile for every ten pixels of width, each after a marker."""

  by_size: ClassVar[bool] = True
  most_tiles: ClassVar[int] = 9

  def tokens_of(self, size):
    tiles, P = size[0] // 10, self.tokens_per_tile
    slots = np.pad(np.arange(tiles * P).reshape(tiles, P), ((0, 0), (1, 1)), constant_values=TEXT)
    slots[:, -1] = NEWLINE
    ids = np.where(slots == TEXT, MARKER, self.image_token_id)
    return PictureTokens(ids.reshape(-1), slots.reshape(-1), tiles, size)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
  """(directory with pictures of two tiles and of one, tokenizer, layout)."""
  directory = tmp_path_factory.mktemp("pictures")
  Image.new("RGB", (20, 7)).save(directory / "wide.png")
  Image.new("RGB", (10, 30)).save(directory / "tall.png")
  tokenizer = tiny_models.make_tokenizer()
  layout = Columns(tokenizer.convert_tokens_to_ids("<image>"), tokens_per_tile=2)
  return str(directory), tokenizer, layout


def make_example(setting, *names: str):
  directory, tokenizer, layout = setting
  turns = (Turn("<image>" * len(names) + "Which?", "this"),)
  record = Record("t.json", 0, "x", names, turns, root=directory)
  (record,) = picture_sizes.with_sizes([record], layout)
  return encode(record, "llava", tokenizer, layout, 500).example


def test_a_row_points_at_the_tiles_of_its_pictures(setting):
  *_, layout = setting
  first, second = make_example(setting, "tall.png", "wide.png"), make_example(setting, "wide.png")
  assert first.tiles == {"tall.png": 1, "wide.png": 2}
  row, paths = build_row([first, second], 300, 3, layout.image_token_id, 2)
  assert paths == ("tall.png", "wide.png")
  is_image = row["tokens"] == layout.image_token_id
  wide = [2, 3, NEWLINE, 4, 5, NEWLINE]
  assert row["image_slots"][is_image].tolist() == [0, 1, NEWLINE, *wide, *wide]
  assert np.all(row["image_slots"][~is_image] == TEXT)
  before = np.flatnonzero(np.isin(row["image_slots"], [0, 2, 4])) - 1
  assert np.all(row["tokens"][before] == MARKER)
  with pytest.raises(ValueError, match="3 tiles of distinct images in a row of 2"):
    build_row([first], 300, 2, layout.image_token_id, 2)


def test_sizes_are_read_once_and_checked(setting, tmp_path):
  *_, layout = setting
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees
  Image.new("RGB", (30, 4)).save(tmp_path / "a.jpg", exif=exif)
  path = str(tmp_path / "b.png")
  Image.new("RGB", (20, 4)).save(path)
  record = Record("t.json", 0, "x", ("a.jpg", "b.png"), (Turn("?", "!"),), root=str(tmp_path))

  def read():
    return picture_sizes.with_sizes([record], layout, str(tmp_path))[0].image_sizes

  assert read() == ((4, 30), (20, 4))
  assert images.open_image(str(tmp_path / "a.jpg")).size == (4, 30)
  Image.new("RGB", (21, 4)).save(path)
  assert read()[1] == (20, 4)  # as kept in the run directory
  with pytest.raises(InputError, match=r"b.png.* has 21 x 4 pixels, and had 20 x 4 when the run"):
    images.check_size(path, images.open_image(path), (20, 4))


def test_a_picture_without_a_size_is_named_with_its_record(setting):
  with pytest.raises(InputError, match=r't.json, record 0 \("id": "x"\): image "gone.png" under'):
    make_example(setting, "gone.png")


@pytest.mark.parametrize("pack", [True, False])
def test_sizes_of_pictures_add_no_shape(pack):
  rng = np.random.default_rng(0)
  tiles = {str(n): int(rng.integers(1, 6)) for n in range(60)}
  shown = [
    {str(n): tiles[str(n)] for n in rng.choice(60, rng.integers(0, 3), replace=False)}
    for _ in range(300)
  ]
  lengths = np.array([10 + 12 * sum(pictures.values()) for pictures in shown], np.int32)
  arguments = np.arange(300), lengths, ImageSets.from_paths(shown)
  options = {"batch_size": 12, "max_length": 256, "row_multiple": 1, "pack": pack}
  plan = plan_batches(*arguments, **options)
  shapes = set(zip(plan.row_counts, plan.lengths, plan.image_counts, strict=True))
  assert len(shapes) == statistics(plan)["shapes"] <= (3 if pack else 4)
  places = 0
  for step in range(plan.steps):
    for row in range(plan.rows):
      distinct = {name for example in plan.rows_of(step, row) for name in shown[example]}
      used = sum(tiles[name] for name in distinct)
      assert used == plan.row_images[step * plan.rows + row] <= plan.image_counts[step]
    places += int(plan.row_counts[step]) * int(plan.image_counts[step])
  assert statistics(plan)["image_efficiency"] == plan.row_images.sum() / places
  assert plan_batches(*arguments, max_images_per_row=10, **options).images <= 10


def test_batches_hold_the_tiles_of_each_picture():
  plan, load = pipelines.make([5, 6, 7], [("3",), ("4", "3"), ()], batch_size=3, row_multiple=1)
  tiled = dataclasses.replace(plan, image_counts=plan.image_counts * 3)

  def load_example(number):
    example, P = load(number), pipelines.PATCHES
    # Of three tiles, only the last one has tokens.
    picture = PictureTokens(np.full(P, pipelines.IMAGE), np.arange(P) + 2 * P, 3, (30, 1))
    return dataclasses.replace(example, pictures=(picture,) * len(example.images))

  def load_image(path, size):
    assert size == (30, 1)
    values = 10 * int(path) + np.arange(3, dtype=np.uint8)
    return np.broadcast_to(values[:, None, None, None], (3, *pipelines.SIZE, 3))

  arguments = pipelines.IMAGE, pipelines.PATCHES, pipelines.SIZE
  with pipelines.Prepared(tiled, load_example, load_image, *arguments).batches() as batches:
    batch = next(batches)
  seen = set()
  for row, slots in enumerate(batch["image_slots"]):
    shown = batch["images"][row, slots[slots >= 0] // pipelines.PATCHES, 0, 0, 0]
    segments = batch["segments"][row][slots >= 0]
    seen |= {tuple(shown[segments == segment].tolist()) for segment in np.unique(segments)}
  assert seen == {(32, 32), (42, 42, 32, 32)}
