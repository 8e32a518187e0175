"""Configs of image processors, pictures in which errors show, and transformers' values."""

import numpy as np
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil


def noise(width, height, seed=0):
  """Returns an RGB image of blurred noise, in which errors of resizing show."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (-(-height // 3), -(-width // 3), 3), np.uint8)
  return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


CLIP = {
  "image_processor_type": "CLIPImageProcessor",
  "crop_size": {"height": 28, "width": 28},
  "size": {"shortest_edge": 28},
}
LLAVA_PAD = {**CLIP, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
SIGLIP = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 28, "width": 28}}
CONFIGS = {
  "clip": (CLIP, "crop"),
  "old clip": (
    {"feature_extractor_type": "CLIPFeatureExtractor", "size": 28, "crop_size": 28},
    "crop",
  ),
  "fast": ({**CLIP, "image_processor_type": "CLIPImageProcessorFast"}, "crop"),
  "resize, then crop": ({**CLIP, "size": {"shortest_edge": 33}}, "crop"),
  "crop larger than resized": ({**CLIP, "size": {"shortest_edge": 21}}, "crop"),
  "crop not square": ({**CLIP, "crop_size": {"height": 20, "width": 31}}, "crop"),
  "no resize": ({**CLIP, "do_resize": False}, "crop"),
  "square size": ({**CLIP, "size": {"height": 28, "width": 28}, "do_center_crop": False}, "crop"),
  "bilinear": ({**CLIP, "resample": 2}, "crop"),
  "own statistics": ({**CLIP, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 1]}, "crop"),
  "own factor": ({**CLIP, "rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1]}, "crop"),
  "not normalized": ({**CLIP, "do_normalize": False}, "crop"),
  "not rescaled": ({**CLIP, "do_rescale": False, "image_mean": [100, 110.5, 90]}, "crop"),
  "llava": ({**CLIP, "image_processor_type": "LlavaImageProcessor"}, "crop"),
  "llava, no pad": ({**LLAVA_PAD, "do_pad": False}, "crop"),
  "llava, pad": (LLAVA_PAD, "pad"),
  "pad without crop": ({**LLAVA_PAD, "do_center_crop": False}, "pad"),
  "pad, other mean": ({**LLAVA_PAD, "image_mean": [0.999, 0.0, 0.5]}, "pad"),
  "siglip": (SIGLIP, "crop"),
  "siglip 2": ({**SIGLIP, "resample": 2, "image_mean": [0.5] * 3, "do_convert_rgb": None}, "crop"),
  "siglip, fast, not square": (
    {"image_processor_type": "SiglipImageProcessorFast", "size": {"height": 20, "width": 31}},
    "crop",
  ),
}
SIZES = [(40, 60), (61, 33), (28, 28), (29, 28), (7, 90), (90, 8), (1, 1), (3, 5), (2, 3), (13, 13)]


def reference_values(config, aspect, image):
  cls = LlavaImageProcessorPil if aspect == "pad" else CLIPImageProcessorPil
  if config.get("image_processor_type", "").startswith("Siglip"):
    cls = SiglipImageProcessorPil
  config = {key: value for key, value in config.items() if not key.endswith("_type")}
  return cls(**config)(image, return_tensors="np")["pixel_values"][0]


def float_values(preprocessor, image):
  """Rescales and normalizes pixels as the device does."""
  pixels = preprocessor.preprocess(image)
  assert pixels.dtype == np.uint8
  assert pixels.shape == (preprocessor.height, preprocessor.width, 3)
  mean, std = np.float32(preprocessor.mean), np.float32(preprocessor.std)
  scaled = pixels.astype(np.float32) * np.float32(preprocessor.rescale_factor)
  return ((scaled - mean) / std).transpose(2, 0, 1)
