"""The files of image processors: read, refused, and saved so that transformers loads them."""

import json
import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoImageProcessor, AutoProcessor, PreTrainedTokenizerFast

from tests.data.processors import (
  CLIP,
  CONFIGS,
  LLAVA_PAD,
  SIGLIP,
  float_values,
  noise,
)
from vlalign_jax.data.image_processor import ImagePreprocessor
from vlalign_jax.errors import InputError


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
