"""Resizes decoded images, as uint8, to the size that the vision tower takes.

Rescaling and normalization run on the device: (pixels * rescale_factor - mean) / std.
"""

import importlib
import math
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from vlalign_jax import json_files
from vlalign_jax.data import images
from vlalign_jax.errors import InputError

ASPECTS = ("auto", "crop", "pad")
TILES = "tiles"  # the aspect of processors that cut pictures into tiles
# Image processor in Hugging Face files -> module below transformers.models, and class there.
_CLIP = ("clip.image_processing_pil_clip", "CLIPImageProcessorPil")
PROCESSORS = {
  "CLIPImageProcessor": _CLIP,
  "LlavaImageProcessor": _CLIP,  # `pad_to_square` is what it has more
  "SiglipImageProcessor": ("siglip.image_processing_pil_siglip", "SiglipImageProcessorPil"),
  "LlavaNextImageProcessor": (
    "llava_next.image_processing_pil_llava_next",
    "LlavaNextImageProcessorPil",
  ),
  "Idefics3ImageProcessor": (
    "idefics3.image_processing_pil_idefics3",
    "Idefics3ImageProcessorPil",
  ),
  "SmolVLMImageProcessor": ("smolvlm.image_processing_pil_smolvlm", "SmolVLMImageProcessorPil"),
  "GotOcr2ImageProcessor": ("got_ocr2.image_processing_pil_got_ocr2", "GotOcr2ImageProcessorPil"),
}
TILED = (  # those that cut pictures into tiles
  "LlavaNextImageProcessor",
  "GotOcr2ImageProcessor",
  "Idefics3ImageProcessor",
  "SmolVLMImageProcessor",
)
# Settings that a model's processor makes, whatever the image processor's own file says.
_MADE = {"GotOcr2ImageProcessor": {"crop_to_patches": True}}


def pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
  """Centers an image on a square of `color` with its longer side, like LLaVA's expand2square."""
  width, height = image.size
  if width == height:
    return image
  side = max(width, height)
  square = Image.new("RGB", (side, side), color)
  square.paste(image, ((side - width) // 2, (side - height) // 2))
  return square


@dataclass(frozen=True, eq=False)
class ImagePreprocessor:
  """The steps of a Hugging Face image processor before it rescales; picklable.

  Attributes:
    aspect: "crop" (shorter side to size, then the center), "pad" (to a square, then to size), or
      TILES (as the processor cuts pictures into tiles).
    mean, std: per channel, on the scale of `pixels * rescale_factor`; 0 and 1 if it does not
      normalize.
    height, width: of every output, or tile of one, in pixels.
    rescale_factor: 1 if the processor does not rescale.
  """

  aspect: str
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  height: int
  width: int
  rescale_factor: float
  pad_color: tuple[int, int, int]
  processor: Any  # one of transformers', without its float steps
  config: dict[str, Any]  # the JSON that `save` writes

  @classmethod
  def from_directory(
    cls, path: str, aspect: str = "auto", kind: str = "CLIPImageProcessor"
  ) -> "ImagePreprocessor":
    """Reads processor_config.json (its `image_processor`) or preprocessor_config.json in `path`.

    Args:
      path: a Hugging Face directory.
      aspect: "crop", "pad", or "auto": by the config's `do_pad`; crop if it has none. With "crop" a
        SigLIP processor, which resizes without regard to the shape, crops nothing. A processor that
        cuts pictures into tiles takes "auto" only.
      kind: the class of a processor whose file names none; it is then a LlavaImageProcessor if it
        pads.

    Raises:
      InputError: the file is missing, its class is not one of PROCESSORS, or its outputs differ
        in size.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):  # transformers' precedence
      config, where = json_files.read(os.path.join(path, name)), os.path.join(path, name)
      if name == "processor_config.json":
        config = config and config.get("image_processor")
      if config is not None:
        return cls.from_config(config, aspect, where, kind)
    raise InputError(
      f"{path}: no preprocessor_config.json (or processor_config.json with an image_processor);"
      " copy it from the model whose vision tower this is"
    )

  @classmethod
  def from_config(
    cls,
    config: dict[str, Any],
    aspect: str = "auto",
    where: str = "image processor",
    kind: str = "CLIPImageProcessor",
  ) -> "ImagePreprocessor":
    """Reads the parsed JSON, as `from_directory` does; `where` names it in errors."""
    kind = _processor_type(config, where, kind)
    processor_class = _processor_class(kind)
    aspect = _resolve_aspect(config, aspect, kind, where)
    names = processor_class.valid_kwargs.__annotations__
    settings: Any = {key: config[key] for key in names if config.get(key) is not None}
    try:
      padding: Any = {} if aspect == TILES else {"do_pad": aspect == "pad"}
      full = processor_class(**{**settings, **padding})
      # `pad_to_square` pads (in transformers, only LLaVA does); float steps run on the device.
      off = ("do_pad", "do_rescale", "do_normalize", "do_convert_rgb")
      steps: Any = dict.fromkeys(off, False) | _MADE.get(kind, {})
      processor = processor_class(**{**settings, **steps})
      mean, std = _per_channel(full.image_mean), _per_channel(full.image_std)
      preprocessor = cls(
        aspect=aspect,
        mean=mean if full.do_normalize else (0.0, 0.0, 0.0),
        std=std if full.do_normalize else (1.0, 1.0, 1.0),
        height=0,
        width=0,
        rescale_factor=float(full.rescale_factor) if full.do_rescale else 1.0,
        pad_color=(int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255)),
        processor=processor,
        config=_saved(full, config, kind, aspect),
      )
      # The rules for sizes are many, so look at the outputs for images of several shapes.
      probes = [Image.new("RGB", size) for size in ((4, 2), (2, 5), (5, 4))]
      shapes = {preprocessor._pixels(image).shape[1:] for image in probes}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      reason = " ".join(str(error).split())
      raise InputError(f"{where}: not a usable image processor ({reason}); fix it") from error
    if len(shapes) > 1:
      raise InputError(
        f"{where}: images of different shapes have outputs of different sizes; set do_center_crop,"
        ' give size as {"height", "width"}, or pad'
      )
    height, width, _ = shapes.pop()
    return replace(preprocessor, height=height, width=width)

  def preprocess(self, image: Image.Image) -> np.ndarray:
    """Returns uint8[height, width, 3] of an RGB image of any size, which must have one tile."""
    (pixels,) = self.tiles(image)
    return pixels

  def tiles(self, image: Image.Image) -> np.ndarray:
    """Returns uint8[n, height, width, 3], the tiles of an RGB image of any size."""
    if image.mode != "RGB":
      raise ValueError(f"expected an RGB image as images.open_image returns it, not {image.mode}")
    return self._pixels(image)

  def _pixels(self, image: Image.Image) -> np.ndarray:
    if self.aspect != TILES:
      image = self._bounded(image)
    if self.aspect == "pad":
      image = pad_to_square(image, self.pad_color)
    pixels = np.asarray(self.processor(image)["pixel_values"])  # uint8[..., 3, H, W]
    pixels = pixels.reshape(-1, *pixels.shape[-3:])
    return np.ascontiguousarray(np.moveaxis(pixels, 1, -1))

  def _bounded(self, image: Image.Image) -> Image.Image:
    """Crops or reduces an extreme shape (1 x 50000), so that no step exceeds images.MAX_PIXELS."""
    short, long = sorted(image.size)
    if self.aspect == "pad":
      factor = math.ceil(long / math.isqrt(images.MAX_PIXELS))
      return image.reduce(factor) if factor > 1 else image
    processor, size = self.processor, self.processor.size
    if not (processor.do_resize and processor.do_center_crop and size.shortest_edge):
      return image
    surplus = long - short * images.MAX_PIXELS // size.shortest_edge**2
    if size.longest_edge or surplus <= 0:
      return image
    cut = (surplus + 1) // 2  # the same at both ends, so that the center stays
    width, height = image.size
    box = (cut, 0, width - cut, height) if width > height else (0, cut, width, height - cut)
    return image.crop(box)

  def save(self, directory: str) -> None:
    """Writes preprocessor_config.json, from which transformers loads an equal processor.

    transformers prefers an `image_processor` entry in processor_config.json, so an existing one is
    replaced too.
    """
    os.makedirs(directory, exist_ok=True)
    json_files.write(os.path.join(directory, "preprocessor_config.json"), self.config)
    path = os.path.join(directory, "processor_config.json")
    existing = json_files.read(path)
    if existing is not None and "image_processor" in existing:
      json_files.write(path, {**existing, "image_processor": self.config})


def _processor_class(kind: str) -> Any:
  """Returns the class in transformers that computes what a processor of this kind does."""
  # transformers takes seconds to import, and opening images does not need it.
  module, name = PROCESSORS[kind]
  return getattr(importlib.import_module(f"transformers.models.{module}"), name)


def _saved(processor: Any, config: dict, kind: str, aspect: str) -> dict[str, Any]:
  """Returns the JSON from which transformers loads the processor."""
  if aspect == TILES:  # such a file may also say how videos are read
    return config | processor.to_dict() | {"image_processor_type": kind}
  if aspect != "pad":
    return processor.to_dict() | {"image_processor_type": kind}
  # The only class that pads to a square; it crops to 224 x 224 if it is not told otherwise.
  crops = {"do_center_crop": bool(processor.do_center_crop)}
  return processor.to_dict() | crops | {"image_processor_type": "LlavaImageProcessor"}


def _processor_type(config: dict[str, Any], where: str, default: str) -> str:
  kind = config.get("image_processor_type") or config.get("feature_extractor_type")
  if kind is None:
    return "LlavaImageProcessor" if config.get("do_pad") else default
  kind = str(kind).replace("FeatureExtractor", "ImageProcessor")
  kind = kind.removesuffix("Fast").removesuffix("Pil")
  if kind not in PROCESSORS:
    *others, last = PROCESSORS
    raise InputError(
      f"{where}: image_processor_type {kind} is not supported; use a model with a"
      f" {', '.join(others)} or {last}"
    )
  return kind


def _resolve_aspect(config: dict[str, Any], aspect: str, kind: str, where: str) -> str:
  if aspect not in ASPECTS:
    raise InputError(f'image aspect "{aspect}" is unknown; choose one of {", ".join(ASPECTS)}')
  if kind in TILED:
    if aspect != "auto":
      raise InputError(
        f'{where}: a {kind} cuts pictures into tiles, and data.image_aspect is "{aspect}"; leave '
        'it at "auto"'
      )
    return TILES
  if aspect != "auto":
    return aspect
  if config.get("do_pad") and kind != "LlavaImageProcessor":
    # Other classes pad a batch to its largest image; only a LlavaImageProcessor pads to a square.
    raise InputError(
      f"{where}: do_pad of a {kind} does not say whether images are padded to a"
      " square; choose the aspect crop or pad"
    )
  return "pad" if config.get("do_pad") else "crop"


def _per_channel(value: Any) -> tuple[float, float, float]:
  values = [value] * 3 if isinstance(value, (int, float)) else [*value]
  if len(values) != 3:
    raise ValueError(f"image_mean and image_std need 3 values, not {len(values)}")
  return float(values[0]), float(values[1]), float(values[2])
