"""Compares preprocessing with transformers' processors."""

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tests.data.processors import (
  CLIP,
  CONFIGS,
  LLAVA_PAD,
  SIGLIP,
  SIZES,
  float_values,
  noise,
  reference_values,
)
from vlalign_jax.data import images
from vlalign_jax.data.image_processor import ImagePreprocessor, pad_to_square


@pytest.mark.parametrize("size", [(5, 2), (2, 5), (4, 1), (3, 3), (1, 1)])
def test_pad_to_square_matches_transformers(size):
  image = noise(*size)
  reference = LlavaImageProcessorPil().pad_to_square(
    np.asarray(image).transpose(2, 0, 1), (1, 2, 3)
  )
  padded = pad_to_square(image, (1, 2, 3))
  np.testing.assert_array_equal(np.asarray(padded), reference.transpose(1, 2, 0))


@pytest.mark.parametrize("name", CONFIGS)
def test_values_equal_transformers(name):
  config, aspect = CONFIGS[name]
  preprocessor = ImagePreprocessor.from_config(config)
  assert preprocessor.aspect == aspect
  for size in SIZES:
    image = noise(*size)
    values = float_values(preprocessor, image)
    expected = reference_values(config, aspect, image)
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("config", [CLIP, LLAVA_PAD])
def test_the_aspect_can_be_chosen(config):
  image = noise(50, 30)
  plain = {key: value for key, value in config.items() if key != "do_pad"}
  for aspect in ("crop", "pad"):
    values = float_values(ImagePreprocessor.from_config(config, aspect), image)
    expected = reference_values({**plain, "do_pad": aspect == "pad"}, aspect, image)
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-5)


def test_a_siglip_processor_that_pads_is_saved_as_one_of_llava(tmp_path):
  """Its gray squares and statistics are kept, and it does not crop."""
  preprocessor = ImagePreprocessor.from_config(SIGLIP, "pad")
  preprocessor.save(str(tmp_path))
  theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
  assert isinstance(theirs, LlavaImageProcessorPil)
  assert preprocessor.pad_color == (127, 127, 127)
  for size in SIZES:
    values = float_values(preprocessor, noise(*size))
    expected = theirs(noise(*size), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=2e-6 * np.abs(expected).max())


def test_a_file_without_a_class_is_of_the_kind_that_is_given():
  config = {"size": {"height": 28, "width": 28}}
  preprocessor = ImagePreprocessor.from_config(config, kind="SiglipImageProcessor")
  assert (preprocessor.mean, preprocessor.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
  assert preprocessor.config["image_processor_type"] == "SiglipImageProcessor"


def test_three_pixel_high_images_keep_their_channels():
  # An array of 3 x W x 3 could be read as channels first.
  image = Image.new("RGB", (5, 3), (200, 100, 0))
  pixels = ImagePreprocessor.from_config(CLIP).preprocess(image)
  assert (pixels == [200, 100, 0]).all()


@pytest.mark.parametrize(("config", "aspect"), [(CLIP, "crop"), (LLAVA_PAD, "pad")])
@pytest.mark.parametrize("upright", [False, True])
def test_extreme_aspect_ratios_stay_small(monkeypatch, config, aspect, upright):
  # Unbounded, 1 x 60000 would be cropped from 28 x 1.7M and padded to 60000 x 60000.
  monkeypatch.setattr(images, "MAX_PIXELS", 2_000_000)
  line = np.zeros((1, 60_000, 3), np.uint8)
  line[:, 29_000:31_000] = (250, 150, 50)
  image = Image.fromarray(line.transpose(1, 0, 2) if upright else line)
  preprocessor = ImagePreprocessor.from_config(config)
  pixels = preprocessor.preprocess(image)
  assert pixels.shape == (28, 28, 3)
  if aspect == "crop":
    assert (pixels == [250, 150, 50]).all()
  else:
    assert np.abs(pixels.astype(int) - preprocessor.pad_color).max() <= 1


@pytest.mark.parametrize("size", [(1, 400), (2, 401), (777, 3), (500, 1)])
def test_bounded_crops_equal_unbounded_ones(monkeypatch, size):
  image = noise(*size)
  expected = reference_values(CLIP, "crop", image)
  monkeypatch.setattr(images, "MAX_PIXELS", 28 * 28 * 20)
  values = float_values(ImagePreprocessor.from_config(CLIP), image)
  if 28 % min(size) == 0:  # then the cut moves nothing by a part of a pixel
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-5)
  else:
    assert np.abs(values - expected).mean() < 0.2


def test_bounded_padding_is_close_to_unbounded(monkeypatch):
  image = noise(600, 300)
  expected = reference_values(LLAVA_PAD, "pad", image)
  monkeypatch.setattr(images, "MAX_PIXELS", 250 * 250)
  values = float_values(ImagePreprocessor.from_config(LLAVA_PAD), image)
  assert np.abs(values - expected).mean() < 0.05


def test_only_rgb_is_preprocessed():
  with pytest.raises(ValueError, match="RGBA"):
    ImagePreprocessor.from_config(CLIP).preprocess(Image.new("RGBA", (3, 3)))
