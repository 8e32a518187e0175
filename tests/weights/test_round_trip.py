"""Tests exporting models and importing them again, and directories that cannot be read."""

import json
import logging
import os
import types

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import parity, tiny_models
from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.weights import export, source


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
  """Directories of a full CLIP, its vision tower alone, and a LLaMA; the torch models."""
  root = tmp_path_factory.mktemp("towers")
  clip = tiny_models.make_clip(root / "clip", whole=True)
  alone = tiny_models.make_clip(root / "vision", whole=False, seed=9)
  alone.load_state_dict(clip.vision_model.state_dict())
  alone.save_pretrained(root / "vision")
  llama = tiny_models.make_llama(root / "llama")
  return types.SimpleNamespace(
    clip=str(root / "clip"),
    vision=str(root / "vision"),
    language=str(root / "llama"),
    torch_vision=alone,
    torch_language=llama,
  )


def assert_same_bits(first, second):
  first, second = trees.flatten(first), trees.flatten(second)
  assert first.keys() == second.keys()
  for path, array in first.items():
    assert array.dtype == second[path].dtype
    np.testing.assert_array_equal(array, second[path], err_msg=path)


def load_in_torch(directory: str):
  """Returns a LlavaForConditionalGeneration; fails if weights are missing or loading it warns."""
  warnings = []
  handler = logging.Handler(logging.WARNING)
  handler.emit = lambda record: warnings.append(record.getMessage())
  logger = logging.getLogger("transformers")
  logger.addHandler(handler)
  try:
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
      directory, output_loading_info=True
    )
  finally:
    logger.removeHandler(handler)
  assert not any(info.values()), info
  assert not warnings
  return model.eval()


def example_of(config):
  """Returns (an example with two images, pictures)."""
  pictures = parity.make_pictures(2, config.vision.image_size)
  return parity.make_example(config, 20, tuple(pictures)), pictures


def torch_logits(model, config):
  with torch.no_grad():
    return parity.torch_logits(model, config, *example_of(config)).numpy()


def our_logits(config, graphdef, params):
  example, pictures = example_of(config)
  rows = parity.make_rows(config, [[example]], pictures, len(example.tokens), 2)
  return parity.logits(graphdef, params, rows)[0]


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


def assemble(towers, **keys):
  """Returns (source, graphdef, params) of a new model of a vision and a language directory."""
  opened = source.open_source(
    parity.model_group(**{"vision": towers.clip, "language": towers.language, **keys})
  )
  return opened, *parity.load_all(opened, seed=3)


def test_a_linear_projector_between_two_towers(towers, tmp_path):
  opened, graphdef, params = assemble(towers, projector="linear")
  config, tokenizer = opened.config, opened.tokenizer
  assert config.image_token_id == tokenizer.convert_tokens_to_ids("<image>") == 502
  assert tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("<pad>") == 503
  assert config.language.vocab_size == 512

  llama = towers.torch_language
  for ours, theirs in (
    (params["language"]["embedding"]["embedding"], llama.model.embed_tokens.weight),
    (params["language"]["head"]["kernel"].T, llama.lm_head.weight),
  ):
    theirs = theirs.detach().numpy()
    np.testing.assert_array_equal(ours[:502], theirs)
    mean = theirs.mean(0, dtype=np.float64).astype(np.float32)
    np.testing.assert_array_equal(ours[502:], np.broadcast_to(mean, (10, 32)))

  # The same computation in torch, with our fresh projector. Its outputs are made small, so that the
  # epsilon of the norm matters.
  params["projector"]["linear"] = jax.tree.map(lambda x: x * 1e-3, params["projector"]["linear"])
  projector = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), params["projector"])
  norm = projector["norm"]
  example, pictures = example_of(config)
  with torch.no_grad():
    pixels = parity.pixel_values(config, [pictures[path] for path in example.images])
    features = towers.torch_vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    projected = features @ projector["linear"]["kernel"] + projector["linear"]["bias"]
    projected = torch.nn.functional.layer_norm(
      projected, (32,), norm["scale"], norm["bias"], eps=1e-12
    )
    tokens = torch.tensor(example.tokens)
    is_image = tokens == config.image_token_id
    embedded = llama.model.embed_tokens(torch.where(is_image, 0, tokens))
    embedded[is_image] = projected.reshape(-1, 32)
    expected = llama(inputs_embeds=embedded[None]).logits[0]
  logits = our_logits(config, graphdef, params)
  assert parity.relative_error(logits[:, :502], expected) < 1e-5

  out = str(tmp_path / "out")
  export.export_model(opened, params, out)
  imported, _, imported_params = parity.open_model(out)
  assert (imported.config, imported.fresh) == (config, ())
  assert_same_bits(imported_params, params)
  stored = json.loads((tmp_path / "out" / "config.json").read_text())
  assert stored["architectures"] == ["VlalignForConditionalGeneration"]
  assert stored["projector_type"] == "linear"


def test_an_mlp_projector_between_two_towers_is_a_llava(towers, tmp_path):
  opened, graphdef, params = assemble(towers, vision=towers.vision, vision_feature_layer="-3,-1")
  out = str(tmp_path / "out")
  export.export_model(opened, params, out)
  logits = our_logits(opened.config, graphdef, params)
  expected = torch_logits(load_in_torch(out), opened.config)
  assert parity.relative_error(logits, expected) < 1e-5
  assert_same_bits(parity.open_model(out)[2], params)


def test_a_full_clip_and_its_vision_tower_give_the_same(towers):
  _, _, from_clip = assemble(towers)
  _, _, from_tower = assemble(towers, vision=towers.vision)
  assert_same_bits(from_clip, from_tower)
  jax.tree.map(lambda x: np.testing.assert_equal(np.isfinite(x).all(), True), from_clip)


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
