"""Decodes images: upright, 8 bits, RGB, and within limits."""

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from vlalign_jax.errors import InputError

MAX_PIXELS = 89_478_485  # PIL warns above this: 1 GiB / 4 / 3
_TRANSPOSE = {  # EXIF orientation -> transposition that turns the image upright
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


def open_image(path: str) -> Image.Image:
  """Decodes an image (or its first frame), upright and as RGB; transparency is dropped.

  Raises:
    InputError: the file is missing, truncated or not an image, or it has more than MAX_PIXELS
      pixels.
  """
  return _read(path, _decode)


def size(path: str) -> tuple[int, int]:
  """Returns (width, height) of the image that `open_image` would return, by its header alone.

  Raises:
    InputError: see `open_image`, of which only what the header shows is noticed.
  """
  return _read(path, _size)


def check_size(path: str, image: Image.Image, expected: tuple[int, int] | None) -> None:
  """Raises an InputError if a decoded image has another size than its tokens were counted for.

  Args:
    path: of the image.
    image: from `open_image`.
    expected: its (width, height) by `size`; None: any.
  """
  if expected is not None and image.size != expected:
    width, height = image.size
    raise InputError(
      f"{_shown(path)} has {width} x {height} pixels, and had {expected[0]} x {expected[1]} when "
      "the run was planned; put the old file back, or start a new run in another --workdir"
    )


def _size(image: Image.Image) -> tuple[int, int]:
  width, height = image.size
  return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def _decode(image: Image.Image) -> Image.Image:
  image.load()
  return _to_rgb(_upright(image))


def _read(path: str, function: Callable[[Image.Image], Any]) -> Any:
  """Returns `function` of an opened image; errors as in `open_image`."""
  shown = _shown(path)
  try:
    with Image.open(path) as image:
      if math.prod(image.size) > MAX_PIXELS:  # by the header; nothing is decoded yet
        raise Image.DecompressionBombError(f"it claims {image.size[0]} x {image.size[1]}")
      return function(image)
  except (FileNotFoundError, NotADirectoryError) as error:
    raise InputError(f"{shown} not found; put it there or set data.images") from error
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    message = f"has more than {MAX_PIXELS:,} pixels ({error}); shrink it or drop its record"
    raise InputError(f"{shown} {message}") from error
  except Exception as error:  # decoders raise almost any exception on a broken file
    reason = " ".join(str(error).replace(f" {path!r}", "").split()) or type(error).__name__
    message = f"cannot be decoded ({reason}); replace it or drop its record"
    raise InputError(f"{shown} {message}") from error


def _shown(path: str) -> str:
  return f'image "{os.path.basename(path)}" under {os.path.dirname(path) or "."}'


def _orientation(image: Image.Image) -> Any:
  try:
    return image.getexif().get(ExifTags.Base.Orientation)
  except Exception:  # broken EXIF raises any exception too; image viewers then do not rotate
    return None


def _upright(image: Image.Image) -> Image.Image:
  method = _TRANSPOSE.get(_orientation(image))
  return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith("I") or image.mode == "F":
    image = _to_8_bit(image)
  rgb = image.convert("RGB")
  # PIL keeps the transparent color, which transformers would paint white.
  rgb.info.pop("transparency", None)
  return rgb


def _to_8_bit(image: Image.Image) -> Image.Image:
  """Scales 16-bit, 32-bit or float grayscale to 8 bits, without the clipping of PIL's convert."""
  values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
  low, high = 0.0, 1.0 if image.mode == "F" else 65535.0
  if values.min() < low or values.max() > high:  # the range of the mode does not hold
    low, high = float(values.min()), float(values.max())
  scaled = (values - low) * (255.0 / max(high - low, 1e-30))
  return Image.fromarray(np.rint(scaled).astype(np.uint8))
