"""Tests the errors about weights that are damaged, missing or do not fit."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import parity, tiny_models
from vlalign_jax.errors import InputError


def test_one_error_names_every_tensor_that_does_not_fit(tmp_path):
  tiny_models.make_llava(tmp_path, layout="old")
  file = tmp_path / "model.safetensors"
  stored = load_file(file)
  del stored["language_model.model.norm.weight"]
  del stored["vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias"]
  stored["multi_modal_projector.linear_1.weight"] = torch.zeros(32, 25)
  stored["language_model.model.layers.2.mlp.up_proj.weight"] = torch.zeros(48, 32)
  stored["image_newline"] = torch.zeros(32)
  save_file(stored, file)
  with pytest.raises(InputError) as caught:
    parity.open_model(tmp_path)
  summary, *lines = str(caught.value).split("\n  ")
  assert summary == "5 tensors do not fit the model that config.json describes:"
  assert sorted(lines) == [
    "missing language.norm.weight (32,)",
    "missing vision.encoder.layers.1.mlp.fc1.bias (40,)",
    f"multi_modal_projector.linear_1.weight in {file} is (32, 25), not (32, 24)",
    f"unexpected image_newline (32,) in {file}",
    f"unexpected language_model.model.layers.2.mlp.up_proj.weight (48, 32) in {file}",
  ]


def test_weights_that_only_pickle_can_read(tmp_path):
  tiny_models.make_llava(tmp_path)
  os.remove(tmp_path / "model.safetensors")
  with pytest.raises(InputError, match=r"no model\.safetensors and no model\.safetensors\.index"):
    parity.open_model(tmp_path)
  (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
  with pytest.raises(InputError, match="only pickled weights there, which are not read"):
    parity.open_model(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 2000, -1])
def test_a_cut_off_file(kept, tmp_path):
  tiny_models.make_llava(tmp_path)
  file = tmp_path / "model.safetensors"
  file.write_bytes(file.read_bytes()[:kept])
  with pytest.raises(InputError, match=rf"{file}: damaged or cut off .*; copy it again"):
    parity.open_model(tmp_path)


def test_a_missing_shard_and_a_broken_index(tmp_path):
  tiny_models.make_llava(tmp_path, max_shard_size="40KB")
  shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
  shard.unlink()
  with pytest.raises(InputError, match=f"names files that are missing: {shard.name}"):
    parity.open_model(tmp_path)
  (tmp_path / "model.safetensors.index.json").write_text("{")
  with pytest.raises(InputError, match="not a safetensors index"):
    parity.open_model(tmp_path)


def test_a_head_that_differs_from_the_tied_embedding_is_refused(tmp_path):
  tiny_models.make_llava(tmp_path, layout="old", text={"tie_word_embeddings": True})
  file = tmp_path / "model.safetensors"
  stored = load_file(file)
  embedding = stored["language_model.model.embed_tokens.weight"]
  save_file({**stored, "language_model.lm_head.weight": embedding.clone()}, file)
  parity.open_model(tmp_path)
  save_file({**stored, "language_model.lm_head.weight": embedding + 1}, file)
  with pytest.raises(InputError, match="lm_head.weight differs from the embedding"):
    parity.open_model(tmp_path)
