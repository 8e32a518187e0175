"""Compares decoding with PIL and known pixels, and preprocessing with transformers' processors."""

import json
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoImageProcessor, AutoProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vlalign_jax.data import images
from vlalign_jax.data.images import ImagePreprocessor, image_path, open_image, pad_to_square
from vlalign_jax.errors import InputError


def noise(width, height, seed=0):
  """Returns an RGB image of blurred noise, in which errors of resizing show."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (-(-height // 3), -(-width // 3), 3), np.uint8)
  return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def save(image, path, **options):
  image.save(path, **options)
  return np.asarray(open_image(str(path)))


# Decoding


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


@pytest.mark.parametrize("path", ["../a.png", "/etc/a.png", "b/../../a.png", "", ".."])
def test_the_root_is_not_left(path):
  with pytest.raises(InputError, match="leaves the image root|absolute path|empty path"):
    image_path(path)


def test_paths_are_normalized():
  assert image_path("./b//c/../a.png") == "b/a.png"
  assert image_path("..a.png") == "..a.png"


# Preprocessing


@pytest.mark.parametrize("size", [(5, 2), (2, 5), (4, 1), (3, 3), (1, 1)])
def test_pad_to_square_matches_transformers(size):
  image = noise(*size)
  reference = LlavaImageProcessorPil().pad_to_square(
    np.asarray(image).transpose(2, 0, 1), (1, 2, 3)
  )
  padded = pad_to_square(image, (1, 2, 3))
  np.testing.assert_array_equal(np.asarray(padded), reference.transpose(1, 2, 0))


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


# Directories


@pytest.mark.parametrize(
  ("config", "aspect", "message"),
  [
    ({**CLIP, "image_processor_type": "Siglip2ImageProcessor"}, "auto", "Siglip2.* not supported"),
    ({**CLIP, "do_center_crop": False}, "auto", "different sizes; set do_center_crop"),
    ({**CLIP, "do_center_crop": False, "do_resize": False}, "pad", "different sizes"),
    ({**CLIP, "do_pad": True}, "auto", "choose the aspect crop or pad"),
    ({**SIGLIP, "do_pad": True}, "auto", "of a SiglipImageProcessor .* choose the aspect"),
    ({**SIGLIP, "size": {"shortest_edge": 28}}, "auto", r'give size as \{"height", "width"\}'),
    ({**SIGLIP, "size": {"width": 28}}, "auto", "not a usable image processor"),
    ({**SIGLIP, "resample": 77}, "auto", "not a usable image processor"),
    ({**CLIP, "size": {"height": 3}}, "auto", "not a usable image processor"),
    ({**CLIP, "image_mean": [0.5]}, "auto", "need 3 values, not 1"),
    ({**CLIP, "resample": 77}, "auto", "not a usable image processor"),
    (CLIP, "stretch", '"stretch" is unknown; choose one of auto, crop, pad'),
    ([], "auto", "not a JSON object"),
    ({}, "auto", None),
  ],
)
def test_bad_configs(tmp_path, config, aspect, message):
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
  if message is None:  # every entry has a default: CLIP's own at 224
    assert ImagePreprocessor.from_directory(str(tmp_path), aspect).height == 224
    return
  with pytest.raises(InputError, match=message):
    ImagePreprocessor.from_directory(str(tmp_path), aspect)


def test_no_config_or_a_broken_one(tmp_path):
  for path in (tmp_path, tmp_path / "none"):
    with pytest.raises(InputError, match=r"no preprocessor_config\.json"):
      ImagePreprocessor.from_directory(str(path))
  (tmp_path / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
  with pytest.raises(InputError, match=r"no preprocessor_config\.json"):
    ImagePreprocessor.from_directory(str(tmp_path))
  (tmp_path / "preprocessor_config.json").write_text("{")
  with pytest.raises(InputError, match=r"preprocessor_config\.json: cannot be read"):
    ImagePreprocessor.from_directory(str(tmp_path))


def test_the_nested_entry_wins_as_in_transformers(tmp_path):
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP))
  nested = {**LLAVA_PAD, "crop_size": 14}
  (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
  preprocessor = ImagePreprocessor.from_directory(str(tmp_path))
  theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
  assert (preprocessor.height, preprocessor.aspect) == (14, "pad")
  assert (theirs.crop_size["height"], theirs.do_pad) == (14, True)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_config_loads_in_transformers(tmp_path, name):
  preprocessor = ImagePreprocessor.from_config(CONFIGS[name][0])
  preprocessor.save(str(tmp_path / "new"))
  theirs = AutoImageProcessor.from_pretrained(tmp_path / "new", backend="pil")
  again = ImagePreprocessor.from_directory(str(tmp_path / "new"))
  for size in ((45, 30), (30, 61)):
    values = float_values(preprocessor, noise(*size))
    expected = theirs(noise(*size), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=2e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(values, float_values(again, noise(*size)))


@pytest.mark.parametrize("nested", [False, True])
def test_saved_config_loads_in_a_llava_processor(tmp_path, nested):
  vocabulary = {"<unk>": 0, "<image>": 1, "hello": 2}
  tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
  tokenizer.add_special_tokens(["<image>"])
  PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path)
  processor = {
    "processor_class": "LlavaProcessor",
    "patch_size": 14,
    "num_additional_image_tokens": 1,
    "vision_feature_select_strategy": "default",
    **({"image_processor": CLIP} if nested else {}),
  }
  (tmp_path / "processor_config.json").write_text(json.dumps(processor))
  preprocessor = ImagePreprocessor.from_config(CLIP, "pad")
  preprocessor.save(str(tmp_path))
  processor = AutoProcessor.from_pretrained(tmp_path)
  assert type(processor.image_processor).__name__ in (
    "LlavaImageProcessor",
    "LlavaImageProcessorPil",
  )
  image = noise(50, 20)
  batch = processor(images=image, text="<image> hello", return_tensors="np")
  np.testing.assert_allclose(
    batch["pixel_values"][0], float_values(preprocessor, image), rtol=1e-6, atol=1e-5
  )


def test_it_can_be_pickled():
  preprocessor = ImagePreprocessor.from_config(LLAVA_PAD)
  copy = pickle.loads(pickle.dumps(preprocessor))
  image = noise(40, 31)
  np.testing.assert_array_equal(copy.preprocess(image), preprocessor.preprocess(image))
