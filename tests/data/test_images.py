"""Compares decoding with PIL and with known pixels."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.data.processors import noise
from vlalign_jax.data import images
from vlalign_jax.data.images import open_image
from vlalign_jax.errors import InputError


def save(image, path, **options):
  image.save(path, **options)
  return np.asarray(open_image(str(path)))


def test_palette_with_transparency_keeps_its_colors(tmp_path):
  image = Image.new("P", (3, 2))
  image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
  image.putdata([0, 1, 2, 2, 1, 0])
  pixels = save(image, tmp_path / "a.png", transparency=1)
  red, green, blue = [255, 0, 0], [0, 255, 0], [10, 20, 30]
  assert pixels.tolist() == [[red, green, blue], [blue, green, red]]
  assert "transparency" not in open_image(str(tmp_path / "a.png")).info


@pytest.mark.parametrize(
  ("mode", "pixel", "expected"),
  [
    ("RGBA", (10, 20, 30, 0), [10, 20, 30]),  # alpha is dropped, not blended
    ("LA", (77, 128), [77, 77, 77]),
    ("L", 77, [77, 77, 77]),
    ("1", 1, [255, 255, 255]),
    ("RGB", (1, 2, 3), [1, 2, 3]),
  ],
)
def test_modes_become_rgb(tmp_path, mode, pixel, expected):
  pixels = save(Image.new(mode, (2, 1), pixel), tmp_path / "a.png")
  assert pixels.dtype == np.uint8
  assert pixels.tolist() == [[expected, expected]]


def test_sixteen_bits_are_scaled(tmp_path):
  values = np.array([[0, 257, 1000, 32768, 65535]], np.uint16)
  expected = [0, 1, 4, 128, 255]  # value / 257, rounded
  image = Image.fromarray(values)
  assert image.mode == "I;16"
  for name in ("a.png", "a.tif"):
    assert save(image, tmp_path / name)[0, :, 1].tolist() == expected
  wide = Image.fromarray(values.astype(np.int32))
  assert wide.mode == "I"
  assert save(wide, tmp_path / "b.tif")[0, :, 2].tolist() == expected


def test_wider_grayscale_is_stretched(tmp_path):
  values = np.array([[-1000, 0, 99000]], np.int32)
  assert save(Image.fromarray(values), tmp_path / "a.tif")[0, :, 0].tolist() == [0, 3, 255]
  unit = np.array([[0.0, 0.5, 1.0, np.nan]], np.float32)
  assert save(Image.fromarray(unit), tmp_path / "b.tif")[0, :, 0].tolist() == [0, 128, 255, 0]


def test_cmyk_jpeg(tmp_path):
  image = noise(40, 24).convert("CMYK")
  pixels = save(image, tmp_path / "a.jpg", quality=95)
  assert pixels.shape == (24, 40, 3)
  with Image.open(tmp_path / "a.jpg") as reference:
    assert reference.mode == "CMYK"
    np.testing.assert_array_equal(pixels, np.asarray(reference.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_exif_orientation(tmp_path, name, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  pixels = save(noise(17, 9), tmp_path / name, exif=exif)
  assert pixels.shape == ((17, 9, 3) if orientation > 4 else (9, 17, 3))
  with Image.open(tmp_path / name) as image:
    np.testing.assert_array_equal(pixels, np.asarray(ImageOps.exif_transpose(image)))


def test_a_quarter_turn_by_hand(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # stored 90 degrees counterclockwise
  image = Image.new("RGB", (2, 1))
  image.putdata([(255, 0, 0), (0, 0, 255)])
  assert save(image, tmp_path / "a.png", exif=exif).tolist() == [[[255, 0, 0]], [[0, 0, 255]]]


def test_broken_exif_does_not_lose_the_image(tmp_path):
  image = noise(8, 8)
  pixels = save(image, tmp_path / "a.png", exif=b"Exif\0\0XX*\0garbage")
  np.testing.assert_array_equal(pixels, np.asarray(image))


def png_header(width, height):
  header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
  return start + struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 0) + b"IDAT" + b"\0" * 4


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(100_000, 100_000), (images.MAX_PIXELS + 1, 1)])
def test_bombs_are_refused_by_their_header(tmp_path, size):
  (tmp_path / "a.png").write_bytes(png_header(*size))
  with pytest.raises(InputError, match='"a.png" under .* has more than 89,478,485 pixels'):
    open_image(str(tmp_path / "a.png"))


def truncated(path):
  noise(200, 200).save(path)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
  ("name", "make"),
  [
    ("cut.jpg", truncated),
    ("cut.png", truncated),
    ("text.png", lambda path: path.write_text("not an image")),
    ("empty.png", lambda path: path.touch()),
    ("header.png", lambda path: path.write_bytes(png_header(2, 2))),
    ("zero.png", lambda path: path.write_bytes(png_header(0, 2))),
  ],
)
def test_undecodable_files_are_named(tmp_path, name, make):
  make(tmp_path / name)
  with pytest.raises(InputError, match=f'image "{name}" under .* cannot be decoded') as raised:
    open_image(str(tmp_path / name))
  assert "\n" not in str(raised.value)


def test_missing_file_and_directory(tmp_path):
  with pytest.raises(InputError, match='image "x.png" under .* not found'):
    open_image(str(tmp_path / "x.png"))
  (tmp_path / "dir").mkdir()
  with pytest.raises(InputError, match="cannot be decoded"):
    open_image(str(tmp_path / "dir"))
