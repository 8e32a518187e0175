"""Tests exporting and importing models that transformers has no class for, and their towers."""

import dataclasses
import json
import warnings

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from tests import parity, peft_models, tiny_models
from tests.weights.round_trip import assert_same_bits, example_of, our_logits
from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.models import vlm
from vlalign_jax.weights import export, export_adapters, source

KINDS = {
  "vit": {"projector": "vit"},
  "perceiver": {"projector": "perceiver"},
  "mmca": {"mmca": True},
}


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
  """Keys of `model` with a CLIP and a LLaMA that is wide enough for a perceiver."""
  root = tmp_path_factory.mktemp("towers")
  tiny_models.make_clip(root / "clip", whole=True)
  tiny_models.make_llama(root / "llama", hidden_size=128)
  return {"vision": str(root / "clip"), "language": str(root / "llama")}


def load_in_torch(kind: type, directory):
  """Returns a model of a transformers class; fails if a weight is missing or unexpected."""
  model, info = kind.from_pretrained(directory, output_loading_info=True)
  assert not any(info.values()), info
  return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_imported_and_its_towers_are_models(kind, towers, tmp_path):
  opened = source.open_source(parity.model_group(**towers, **KINDS[kind]))
  graphdef, params = parity.load_all(opened, seed=3)
  # Fresh parameters at special values would hide a mistake.
  params["projector"] = jax.tree.map(lambda x: x + 0.1, params["projector"])
  out = tmp_path / "out"
  export.export_model(opened, params, str(out))
  imported, _, imported_params = parity.open_model(out)
  config = opened.config
  assert (imported.config, imported.fresh) == (config, ())
  assert (config.mmca, config.tokens_per_image) == (
    kind == "mmca",
    256 if kind == "perceiver" else 9,
  )
  assert_same_bits(imported_params, params)
  stored = json.loads((out / "config.json").read_text())
  assert stored["architectures"] == ["VlalignForConditionalGeneration"]
  assert (out / "processor_config.json").exists() == (kind != "perceiver")

  clip = load_in_torch(transformers.CLIPVisionModel, out / "vision")
  pictures = list(parity.make_pictures(2, config.vision.image_size).values())
  with torch.no_grad():
    pixels = parity.pixel_values(config, pictures)
    theirs = clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
  graphdef, _ = vlm.abstract_params(config)
  model = jax.tree.map(np.asarray, params)
  features = parity.nnx.merge(graphdef, model).vision_features(np.stack(pictures)[None])
  assert parity.relative_error(features, theirs) < 1e-5

  llama = load_in_torch(transformers.LlamaForCausalLM, out / "language")
  tokenizer = transformers.AutoTokenizer.from_pretrained(out / "language")
  assert tokenizer.convert_tokens_to_ids("<image>") == config.image_token_id
  example = parity.make_example(config, 9)
  rows = parity.make_rows(config, [[example]], {}, 9, 0)
  with torch.no_grad():
    theirs = llama(torch.tensor(example.tokens)[None].long()).logits
  assert parity.relative_error(parity.logits(graphdef, params, rows), theirs) < 1e-5


def test_transformers_refuses_it_as_a_llava(towers, tmp_path):
  opened = source.open_source(parity.model_group(**towers, projector="linear"))
  export.export_model(opened, parity.load_all(opened)[1], str(tmp_path / "out"))
  with pytest.raises(OSError, match=r"no file named .*model.safetensors"):
    transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_exported_adapters_belong_to_the_towers(towers, tmp_path):
  """PEFT loads the adapters of each tower on it; imported here, they have the same bits."""
  ranks = {"rank": 2, "vision_rank": 3, "alpha": 4.0, "use_rslora": True}
  config = peft_models.config_for("", **ranks)
  config.train.embeddings = True
  config.model.update(parity.model_group(**towers, projector="linear", mmca=True))
  opened = source.open_for(config)
  graphdef, params = parity.load_all(opened, seed=3)
  params = trees.map_paths(lambda path, x: x + 0.1 if path.endswith("lora_b") else x, params)
  params["projector"] = jax.tree.map(lambda x: x + 0.1, params["projector"])
  flat = trees.flatten(params)
  kept = {
    path: x
    for path, x in flat.items()
    if "lora_" in path or path.startswith(("projector/", "language/embedding/"))
  }
  out = tmp_path / "peft"
  export_adapters.export_adapters(opened.config, kept, str(out))
  base = dataclasses.replace(opened, config=dataclasses.replace(opened.config, lora=None))
  export.export_model(base, params, str(tmp_path / "base"))

  config.lora.init_from = str(out)
  _, imported = parity.load_all(source.open_for(config), seed=5)
  for path, array in kept.items():
    np.testing.assert_array_equal(trees.flatten(imported)[path], array, err_msg=path)

  def adapted(kind: type, tower: str):
    model = kind.from_pretrained(tmp_path / "base" / tower)
    with warnings.catch_warnings():
      warnings.simplefilter("error", UserWarning)
      return peft.PeftModel.from_pretrained(model, out / tower).eval()

  model = parity.nnx.merge(graphdef, jax.tree.map(np.asarray, params))
  pictures = list(parity.make_pictures(2, opened.config.vision.image_size).values())
  pixels = parity.pixel_values(opened.config, pictures)
  example = parity.make_example(opened.config, 9)
  rows = parity.make_rows(opened.config, [[example]], {}, 9, 0)
  with torch.no_grad():
    clip = adapted(transformers.CLIPVisionModel, "vision")
    features = clip(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    llama = adapted(transformers.LlamaForCausalLM, "language")
    logits = llama(input_ids=torch.tensor(example.tokens)[None].long()).logits
  assert parity.relative_error(model.vision_features(np.stack(pictures)[None]), features) < 1e-5
  assert parity.relative_error(parity.logits(graphdef, params, rows), logits) < 1e-5
  with pytest.raises(InputError, match="projector/linear/lora_a was trained, and PEFT has no"):
    export_adapters.export_adapters(
      opened.config, kept | {"projector/linear/lora_a": 0}, str(tmp_path / "no")
    )


@pytest.mark.parametrize("kind", ["linear", "vit", "perceiver"])
def test_features_in_a_batch(kind, towers):
  """They replace those of the tower, row by row, with the class token."""
  keys = {"projector": kind, "vision_feature_select_strategy": "full"}
  opened = source.open_source(parity.model_group(**towers, **keys))
  graphdef, params = parity.load_all(opened, seed=3)
  model = parity.nnx.merge(graphdef, params)
  images = np.stack([*parity.make_pictures(4, opened.config.vision.image_size).values()])
  rows = {"images": images.reshape(2, 2, *images.shape[1:])}
  features = model.vision_features(rows["images"])
  by_row = features.reshape(2, 2, *features.shape[1:])
  embeddings = model.image_features(rows | {"vision_features": by_row})
  assert embeddings.shape == (2, 2 * opened.config.tokens_per_image, 128)
  np.testing.assert_allclose(embeddings, model.image_features(rows), rtol=1e-5, atol=1e-6)


def test_a_reward_model(towers, tmp_path):
  opened = source.open_source(parity.model_group(**towers, mmca=True))
  opened = source._with_head(opened, vlm.SCORE, "")
  graphdef, params = parity.load_all(opened, seed=3)
  out = tmp_path / "out"
  export.export_model(opened, params, str(out))
  imported, _, imported_params = parity.open_model(out)
  assert (imported.config, imported.fresh) == (opened.config, ())
  assert_same_bits(imported_params, params)
  llama = load_in_torch(transformers.LlamaForSequenceClassification, out / "language")
  tokens = np.arange(5, 14)
  with torch.no_grad():
    theirs = llama(torch.tensor(tokens)[None]).logits[0, 0]
  example = dataclasses.replace(parity.make_example(opened.config, 9), tokens=tokens)
  rows = parity.make_rows(opened.config, [[example]], {}, 9, 0)
  model = parity.nnx.merge(graphdef, params)
  score = model.scores(model(rows), np.array([[[8]]]))
  assert parity.relative_error(score[0, 0, 0], theirs) < 1e-5


def test_a_model_keeps_its_attention(towers, tmp_path):
  """Multi-modal causal attention belongs to the model: later runs need not set the key."""
  opened = source.open_source(parity.model_group(**towers, mmca=True))
  _, params = parity.load_all(opened)
  export.export_model(opened, params, str(tmp_path / "out"))
  plain = tiny_models.make_llava(tmp_path / "plain")
  assert plain is not None
  for directory, mmca, expected in (
    ("out", False, True),
    ("plain", True, True),
    ("plain", False, False),
  ):
    group = parity.model_group(init_from=str(tmp_path / directory), mmca=mmca)
    assert source.open_source(group).config.mmca == expected


def test_mmca_changes_the_logits_after_the_image(towers):
  opened = source.open_source(parity.model_group(**towers))
  graphdef, params = parity.load_all(opened)
  plain = our_logits(opened.config, graphdef, params)
  config = dataclasses.replace(opened.config, mmca=True)
  with_mmca = our_logits(config, vlm.abstract_params(config)[0], params)
  tokens = example_of(config)[0].tokens
  image = np.argmax(tokens == config.image_token_id)
  np.testing.assert_allclose(with_mmca[:image], plain[:image], rtol=1e-5, atol=1e-5)
  assert parity.relative_error(with_mmca[image:], plain[image:]) > 0.05


def test_fresh_parameters_are_the_same_in_every_dtype(towers):
  """A reference in bfloat16 starts as the policy does, up to rounding."""
  opened = source.open_source(parity.model_group(**towers, projector="linear"))
  full = trees.flatten(parity.load_all(opened, seed=3)[1])
  half = trees.flatten(parity.load_all(opened, seed=3, param_dtype="bfloat16")[1])
  path = "projector/linear/kernel"
  np.testing.assert_array_equal(full[path].astype("bfloat16"), half[path])


def test_a_perceiver_needs_heads_of_128(tmp_path):
  tiny_models.make_clip(tmp_path / "clip", whole=False)
  tiny_models.make_llama(tmp_path / "llama")
  group = parity.model_group(
    vision=str(tmp_path / "clip"), language=str(tmp_path / "llama"), projector="perceiver"
  )
  with pytest.raises(InputError, match="heads of 128, and the language model's width 32 is no"):
    source.open_source(group)
