"""Compares logits with those of transformers' torch LLaVA for a grid of architectures."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
import transformers

from tests import parity, tiny_models
from vlalign_jax import trees
from vlalign_jax.models import rope, tiles
from vlalign_jax.weights import hf_config, names

LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}
# The first wavelengths of 12 channels are 6, 18, 50: below 32 / 4, in between, and above 32.
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
  "rope_theta": 500.0,
}

GRID = {
  "base": {},
  "llama3_tied_biases_last_full": {
    "text": {
      "rope_parameters": LLAMA3,
      "tie_word_embeddings": True,
      "attention_bias": True,
      "mlp_bias": True,
    },
    "vision": {"hidden_act": "gelu"},
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
  },
  "linear_all_heads_list_no_projector_bias_odd_size": {
    "text": {"rope_parameters": LINEAR, "num_key_value_heads": 4},
    "vision": {"image_size": 15},
    "vision_feature_layer": [-3, -1],
    "multimodal_projector_bias": False,
  },
  "one_key_head_input_features_full": {
    "text": {
      "num_key_value_heads": 1,
      "head_dim": None,
      "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
      "rms_norm_eps": 1e-2,
      "attention_bias": True,
    },
    "vision_feature_layer": 0,
    "vision_feature_select_strategy": "full",
  },
  "positive_layer_one_decoder_layer": {
    "text": {"num_hidden_layers": 1, "mlp_bias": True, "hidden_act": "gelu"},
    "vision": {"hidden_act": "gelu", "layer_norm_eps": 1e-2},
    "vision_feature_layer": 1,
    "projector_hidden_act": "gelu_pytorch_tanh",
  },
  "list_out_of_order_full": {
    "vision_feature_layer": [2, 0, -2],
    "vision_feature_select_strategy": "full",
    "projector_hidden_act": "silu",
  },
  "qwen2_tied": {"text": {"model_type": "qwen2", "tie_word_embeddings": True, "head_dim": None}},
  "qwen2_window": {"text": tiny_models.QWEN2_WINDOW},
  "mistral_window": {"text": tiny_models.MISTRAL_WINDOW},
  "qwen3_tied_biases": {
    "text": {"model_type": "qwen3", "tie_word_embeddings": True, "attention_bias": True}
  },
  "qwen3_window": {"text": tiny_models.QWEN3_WINDOW},
  "siglip": tiny_models.SIGLIP,
  "siglip_last_layer_odd_size_gelu": {
    "vision": tiny_models.SIGLIP["vision"]
    | {"image_size": 15, "hidden_act": "gelu", "layer_norm_eps": 1e-2, "vision_use_head": False},
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
  },
  # As in transformers, `default` leaves out the first patch.
  "siglip_list_default": {
    "vision": tiny_models.SIGLIP["vision"],
    "vision_feature_layer": [0, -2],
    "text": tiny_models.QWEN2_WINDOW,
  },
}

LENGTH, IMAGES = 96, 3


def packed_batch(config):
  """Makes rows of three and two examples and a row of padding; row 1 shows a stored image twice.

  Returns:
    (batch, layout as lists of examples, pictures)
  """
  pictures = parity.make_pictures(IMAGES, config.vision.image_size)
  make = lambda length, images, seed: parity.make_example(config, length, images, seed)  # noqa: E731
  layout = [
    [make(20, (), 1), make(15, ("0.png",), 2), make(30, (), 3)],
    [make(25, ("1.png", "2.png", "0.png"), 4), make(9, ("2.png",), 5)],
    [],
  ]
  return parity.make_rows(config, layout, pictures, LENGTH, IMAGES), layout, pictures


def errors(logits, model, config, layout, pictures) -> list[float]:
  """Returns the relative error of each example's logits."""
  relative = []
  for row, examples in zip(logits, layout, strict=True):
    start = 0
    for example in examples:
      stop = start + len(example.tokens)
      with torch.no_grad():
        expected = parity.torch_logits(model, config, example, pictures)
      relative.append(parity.relative_error(row[start:stop], expected))
      start = stop
  assert np.isfinite(logits).all()
  return relative


@pytest.mark.parametrize("name", GRID)
def test_logits_equal_torch(name, tmp_path):
  model = tiny_models.make_llava(tmp_path, **GRID[name])
  source, graphdef, params = parity.open_model(tmp_path)
  rows, layout, pictures = packed_batch(source.config)
  logits = parity.logits(graphdef, params, rows)
  if model.config.vision_feature_layer == 0:  # transformers 5.23 reads 0 as "none"
    model.config.vision_feature_layer = [0]
  assert max(errors(logits, model, source.config, layout, pictures)) < 1e-5


def test_blocks_of_queries_and_bfloat16(tmp_path, monkeypatch):
  model = tiny_models.make_llava(tmp_path)
  source, graphdef, params = parity.open_model(tmp_path)
  rows, layout, pictures = packed_batch(source.config)
  monkeypatch.setattr(tiles, "CPU_TILE", 20)  # four tiles, the last one padded
  logits = parity.logits(graphdef, params, rows)
  assert max(errors(logits, model, source.config, layout, pictures)) < 1e-5
  graphdef, _ = parity.load_all(source, dtype="bfloat16")
  logits = parity.logits(graphdef, params, rows)
  relative = errors(logits, model, source.config, layout, pictures)
  assert 1e-3 < max(relative) < 2e-2  # the lower bound shows that it was bfloat16


def test_answers_of_a_shared_prompt_equal_separate_sequences(tmp_path):
  model = tiny_models.make_llava(tmp_path)
  source, graphdef, params = parity.open_model(tmp_path)
  config = source.config
  pictures = parity.make_pictures(1, config.vision.image_size)
  prompt = parity.make_example(config, 12, ("0.png",), 1)
  before = parity.make_example(config, 7, (), 2)
  answers = [parity.make_example(config, n, (), n).tokens for n in (5, 9, 3)]
  # The prompt stops one token short, and each branch begins with that token.
  shared, first = prompt.tokens[:-1], prompt.tokens[-1:]
  parts = [shared, *(np.concatenate([first, answer]) for answer in answers)]
  starts = [0, *[len(shared)] * 3]
  tokens = np.concatenate(parts)
  together = dataclasses.replace(
    prompt,
    tokens=tokens,
    positions=np.concatenate(
      [s + np.arange(len(p), dtype=np.int32) for s, p in zip(starts, parts, strict=True)]
    ),
    branches=np.repeat(np.arange(4, dtype=np.int32), [len(part) for part in parts]),
    targets=np.zeros(len(tokens), np.int32),
    loss_mask=np.zeros(len(tokens), np.float32),
  )
  rows = parity.make_rows(config, [[before, together]], pictures, LENGTH, 1)
  logits = parity.logits(graphdef, params, rows)[0]
  end = len(before.tokens) + len(shared)
  for answer in answers:
    alone = dataclasses.replace(prompt, tokens=np.concatenate([prompt.tokens, answer]))
    with torch.no_grad():
      expected = parity.torch_logits(model, config, alone, pictures)
    start, end = end, end + 1 + len(answer)
    parts = [logits[len(before.tokens) :][: len(shared)], logits[start:end]]
    assert parity.relative_error(np.concatenate(parts), expected) < 1e-5


def test_an_example_without_images_in_a_batch_without_images(tmp_path):
  model = tiny_models.make_llava(tmp_path)
  source, graphdef, params = parity.open_model(tmp_path)
  example = parity.make_example(source.config, 30)
  rows = parity.make_rows(source.config, [[example]], {}, 40, 0)
  logits = parity.logits(graphdef, params, rows)
  assert max(errors(logits, model, source.config, [[example]], {})) < 1e-5


@pytest.mark.parametrize(
  ("layout", "tied", "max_shard_size"),
  [
    ("transformers", False, "5GB"),
    ("transformers", True, "20KB"),
    ("old", False, "5GB"),
    ("old", True, "5GB"),
    ("new", False, "5GB"),
  ],
)
def test_every_layout_loads_the_same_bits(layout, tied, max_shard_size, tmp_path):
  model = tiny_models.make_llava(
    tmp_path,
    text={"tie_word_embeddings": tied, "attention_bias": True, "mlp_bias": True},
    layout=layout,
    max_shard_size=max_shard_size,
  )
  assert os.path.exists(tmp_path / "model.safetensors.index.json") == (max_shard_size == "20KB")
  source, _, params = parity.open_model(tmp_path)
  expected = parity.as_params(source.config, model.state_dict())
  loaded = trees.flatten(params)
  assert loaded.keys() == expected.keys()
  assert ("language/head/kernel" in loaded) == (not tied)
  for path, array in expected.items():
    np.testing.assert_array_equal(loaded[path], array, err_msg=path)


def test_a_tied_model_may_still_store_its_head(tmp_path):
  tiny_models.make_llava(tmp_path, text={"tie_word_embeddings": True}, layout="old")
  from safetensors.torch import load_file, save_file

  file = str(tmp_path / "model.safetensors")
  stored = load_file(file)
  stored["language_model.lm_head.weight"] = stored["language_model.model.embed_tokens.weight"] + 0
  stored["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
  stored["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(10)
  save_file(stored, file)
  source, _, params = parity.open_model(tmp_path)
  assert source.config.language.tied_embeddings
  assert "head" not in params["language"]


@pytest.mark.parametrize(
  ("scaling", "theta"),
  [
    (None, 500000.0),
    (None, None),
    ({"type": "linear", "factor": 2.0}, 10000.0),
    ({"rope_type": "linear", "factor": 2.5}, None),
    ({key: value for key, value in LLAMA3.items() if key != "rope_theta"}, 500.0),
    (
      {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
      },
      500000.0,
    ),
  ],
)
def test_rope_in_either_spelling_gives_torch_frequencies(scaling, theta, tmp_path):
  """`rope_scaling` with a top-level `rope_theta` (transformers 4), and `rope_parameters` (5)."""
  config = tiny_models.text_config(
    tiny_models.make_tokenizer(), head_dim=128, max_position_embeddings=131072
  ).to_dict()
  del config["rope_parameters"]
  old = config | {"rope_scaling": scaling} | ({"rope_theta": theta} if theta else {})
  new = {"rope_type": "default", **(scaling or {}), "rope_theta": theta or 10000.0}
  new["rope_type"] = new.pop("type", new["rope_type"])
  for number, content in enumerate((old, config | {"rope_parameters": new})):
    directory = tmp_path / str(number)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(content))
    hf = hf_config.read_config(str(directory))
    frequencies = rope.inverse_frequencies(hf_config.rope_config(hf, "config"), hf.head_dim)
    embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf)
    np.testing.assert_allclose(frequencies, embedding.inv_freq.numpy(), rtol=1e-6)
  plain = 1.0 / (theta or 10000.0) ** (np.arange(0, 128, 2) / 128)
  assert np.allclose(frequencies, plain) == (scaling is None)


def test_every_tensor_of_torch_has_one_parameter(tmp_path):
  model = tiny_models.make_llava(tmp_path, text={"attention_bias": True, "mlp_bias": True})
  source, _, _ = parity.open_model(tmp_path)
  config = source.config
  known = set()
  for name in names.names_of(config):
    layers = config.vision.layers if name.path.startswith("vision") else config.language.layers
    for layer in range(layers) if name.stacked else (None,):
      tensor = parity.torch_name(name.tensor.format(layer))
      assert tensor not in known
      known.add(tensor)
  unused = set(model.state_dict()) - known
  # Features come from the second-to-last layer: the last layer and post_layernorm are not run.
  assert all("encoder.layers.2." in name or "post_layernorm" in name for name in unused)
  assert known <= set(model.state_dict())
