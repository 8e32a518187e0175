"""Tests exporting models and importing them again."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from tests import parity, tiny_models
from tests.weights.round_trip import (
  assert_same_bits,
  load_in_torch,
  torch_logits,
)
from vlalign_jax.errors import InputError
from vlalign_jax.weights import export

VARIANTS = {
  "base": {},
  "tied_biases_list_full": {
    "text": {
      "tie_word_embeddings": True,
      "attention_bias": True,
      "mlp_bias": True,
      "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    },
    "vision": {"image_size": 15},
    "vision_feature_layer": [-3, 0],
    "vision_feature_select_strategy": "full",
    "multimodal_projector_bias": False,
  },
  "one_layer_of_three_in_a_list": {"vision_feature_layer": [-3], "layout": "old"},
  "qwen2": {"text": tiny_models.QWEN2_WINDOW},
  "mistral": {"text": tiny_models.MISTRAL_WINDOW},
  "qwen3": {"text": tiny_models.QWEN3_WINDOW},
  "qwen3_tied": {"text": {"model_type": "qwen3", "tie_word_embeddings": True}},
  "siglip": tiny_models.SIGLIP,
  "siglip_old_layout": tiny_models.SIGLIP | {"layout": "old"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_exports_load_in_torch_and_here(variant, tmp_path):
  original = tiny_models.make_llava(tmp_path / "in", **VARIANTS[variant])
  opened, _, params = parity.open_model(tmp_path / "in")
  out = str(tmp_path / "out")
  export.export_model(opened, params, out)
  imported, _, imported_params = parity.open_model(out)
  assert imported.config == opened.config
  assert imported.generation.to_dict() == opened.generation.to_dict()
  assert_same_bits(imported_params, params)
  exported = load_in_torch(out)
  config = opened.config
  assert parity.relative_error(torch_logits(exported, config), torch_logits(original, config)) < (
    1e-6
  )
  unused = [name for name in exported.state_dict() if "post_layernorm" in name or ".2." in name]
  assert len(unused) >= 18  # weights and biases of post_layernorm and of the last vision layer
  for name, tensor in original.state_dict().items():
    assert torch.equal(exported.state_dict()[name], tensor), name


def test_processor_of_an_export_makes_our_tokens_and_pixels(tmp_path):
  tiny_models.make_llava(
    tmp_path / "in", vision={"image_size": 15}, vision_feature_select_strategy="full"
  )
  opened, _, params = parity.open_model(tmp_path / "in")
  export.export_model(opened, params, str(tmp_path / "out"))
  processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
  assert type(processor).__name__ == "LlavaProcessor"
  noise = np.random.default_rng(0).integers(0, 256, (40, 23, 3), np.uint8)
  pictures = [Image.fromarray(noise), Image.fromarray(noise[:20, ::-1])]
  prompt = "USER: <image>\nWhat is in <image>? ASSISTANT:"
  processed = processor(images=pictures, text=prompt, return_tensors="np")
  config = opened.config
  repeated = prompt.replace("<image>", "<image>" * config.tokens_per_image)
  assert processed["input_ids"][0].tolist() == opened.tokenizer(repeated)["input_ids"]
  assert (processed["input_ids"] == config.image_token_id).sum() == 2 * config.tokens_per_image
  ours = [opened.images.preprocess(picture) for picture in pictures]
  np.testing.assert_allclose(
    processed["pixel_values"], parity.pixel_values(config, ours), rtol=0, atol=1e-6
  )


@pytest.mark.parametrize(
  ("rope", "scaling"),
  [
    ({"rope_type": "default", "rope_theta": 500000.0}, None),
    (
      {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
      {"rope_type": "linear", "factor": 2.0},
    ),
  ],
)
def test_an_exported_config_has_the_rope_keys_of_transformers_4(rope, scaling, tmp_path):
  tiny_models.make_llava(tmp_path / "in", text={"rope_parameters": rope})
  opened, _, _ = parity.open_model(tmp_path / "in")
  export.save_model_files(opened, str(tmp_path / "out"), "float32")
  written = (tmp_path / "out" / "config.json").read_text()
  text = json.loads(written)["text_config"]
  assert (text["rope_theta"], text["rope_scaling"]) == (rope["rope_theta"], scaling)
  assert text["rope_parameters"] == rope
  assert str(tmp_path) not in written
  # transformers 5 reads the same from both spellings together.
  assert transformers.AutoConfig.from_pretrained(tmp_path / "out").text_config.rope_parameters == (
    rope
  )


def test_shards_with_an_index(tmp_path):
  tiny_models.make_llava(tmp_path / "in")
  opened, _, params = parity.open_model(tmp_path / "in")
  out = tmp_path / "out"
  export.export_model(opened, params, str(out), max_shard_bytes=40_000)
  shards = sorted(path.name for path in out.glob("*.safetensors"))
  assert len(shards) > 3
  assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
  index = json.loads((out / "model.safetensors.index.json").read_text())
  assert set(index["weight_map"].values()) == set(shards)
  sizes = {}
  for shard in shards:
    stored = load_file(out / shard)
    assert {name for name, file in index["weight_map"].items() if file == shard} == stored.keys()
    sizes[shard] = sum(tensor.nbytes for tensor in stored.values())
    assert sizes[shard] <= 40_000 or len(stored) == 1  # an embedding of 64 KiB alone is more
  assert index["metadata"]["total_size"] == sum(sizes.values())
  assert_same_bits(parity.open_model(out)[2], params)
  load_in_torch(str(out))


def test_export_in_another_dtype(tmp_path):
  tiny_models.make_llava(tmp_path / "in")
  opened, _, params = parity.open_model(tmp_path / "in")
  out = str(tmp_path / "out")
  export.export_model(opened, params, out, dtype=np.dtype(ml_dtypes.bfloat16))
  assert {tensor.dtype for tensor in load_file(out + "/model.safetensors").values()} == {
    torch.bfloat16
  }
  assert load_in_torch(out).dtype == torch.bfloat16
  _, _, imported = parity.open_model(out, param_dtype="bfloat16")
  assert_same_bits(imported, jax.tree.map(lambda x: x.astype("bfloat16"), params))


def test_export_refuses_a_directory_that_is_not_empty(tmp_path):
  tiny_models.make_llava(tmp_path)
  opened, _, params = parity.open_model(tmp_path)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  with pytest.raises(InputError, match="is not empty; choose another output directory"):
    export.export_model(opened, params, str(tmp_path))
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
