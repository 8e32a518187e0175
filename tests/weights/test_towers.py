"""Tests vision towers other than CLIP: separate ones, their heads, adapters, processors, errors."""

import json
import logging

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import parity, peft_models, tiny_models
from tests.weights.round_trip import (
  assert_same_bits,
  load_in_torch,
  our_logits,
  torch_logits,
)
from vlalign_jax.errors import InputError
from vlalign_jax.models import vlm
from vlalign_jax.weights import export, load, names, source, towers

FULL = {"vision_feature_select_strategy": "full"}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
  """Directories of a full SigLIP, its vision tower alone, and a LLaMA."""
  root = tmp_path_factory.mktemp("towers")
  both = tiny_models.make_siglip(root / "siglip", whole=True)
  alone = tiny_models.make_siglip(root / "vision", whole=False, seed=9)
  alone.load_state_dict(both.vision_model.state_dict())
  alone.save_pretrained(root / "vision")
  tiny_models.make_llama(root / "llama")
  return root


def assemble(root, vision: str = "siglip", **keys):
  """(source, graphdef, params) of a new model of towers in `root`."""
  keys = {"vision": str(root / vision), "language": str(root / "llama"), **FULL, **keys}
  opened = source.open_source(parity.model_group(**keys))
  return opened, *parity.load_all(opened, seed=3)


def stored(*directories) -> dict[str, torch.Tensor]:
  """Canonical name -> tensor of directories with model.safetensors."""
  files = [load_file(directory / "model.safetensors") for directory in directories]
  return {names.canonical(name): tensor for file in files for name, tensor in file.items()}


def load_without_warnings(kind, directory):
  """A model of transformers; fails if weights are missing or left over, or loading it warns."""
  warnings = []
  handler = logging.Handler(logging.WARNING)
  handler.emit = lambda record: warnings.append(record.getMessage())
  logger = logging.getLogger("transformers")
  logger.addHandler(handler)
  try:
    model, info = kind.from_pretrained(directory, output_loading_info=True)
  finally:
    logger.removeHandler(handler)
  assert not any(info.values()), info
  assert not warnings
  return model.eval()


def test_the_registry_has_all_of_a_tower():
  classes = [tower.config for tower in towers.TOWERS.values()]
  assert len(set(classes)) == len(classes)
  for tower in towers.TOWERS.values():
    assert hasattr(transformers, tower.architecture)
    assert hasattr(transformers, tower.processor)


def test_a_full_siglip_and_its_vision_tower_give_the_same(directories):
  opened, _, from_both = assemble(directories)
  load.check_weights(opened)
  _, _, from_tower = assemble(directories, "vision")
  assert_same_bits(from_both, from_tower)
  assert opened.config.tokens_per_image == 9


@pytest.mark.parametrize("layers", ["-2", "-3,-1"])
def test_a_new_model_is_a_llava(layers, directories, tmp_path):
  opened, graphdef, params = assemble(directories, vision_feature_layer=layers)
  out = tmp_path / "out"
  export.export_model(opened, params, str(out))
  model = load_without_warnings(transformers.AutoModelForImageTextToText, out)
  assert isinstance(model, transformers.LlavaForConditionalGeneration)
  logits = our_logits(opened.config, graphdef, params)
  assert parity.relative_error(logits, torch_logits(model, opened.config)) < 1e-5
  assert_same_bits(parity.open_model(out)[2], params)
  before, after = stored(directories / "vision"), stored(out)
  assert sum(name.startswith("vision.head.") for name in before) == 11
  for name, tensor in before.items():
    assert torch.equal(after[name], tensor), name


def test_the_tower_of_another_projector(directories, tmp_path):
  """The tower is a directory that transformers loads, with its head and its layers."""
  opened, graphdef, params = assemble(directories, projector="linear")
  out = tmp_path / "out"
  export.export_model(opened, params, str(out))
  tower = load_without_warnings(transformers.SiglipVisionModel, out / "vision")
  assert load_without_warnings(transformers.AutoModel, out / "vision").use_head
  before = stored(directories / "vision")
  assert before.keys() == {f"vision.{name}" for name in tower.state_dict()}
  for name, tensor in tower.state_dict().items():
    assert torch.equal(before[f"vision.{name}"], tensor), name
  pictures = list(parity.make_pictures(2, opened.config.vision.image_size).values())
  with torch.no_grad():
    pixels = parity.pixel_values(opened.config, pictures)
    theirs = tower(pixels, output_hidden_states=True).hidden_states[-2]
  features = parity.nnx.merge(graphdef, params).vision_features(np.stack(pictures)[None])
  assert parity.relative_error(features, theirs) < 1e-5
  imported, _, imported_params = parity.open_model(out)
  assert imported.config == opened.config
  assert_same_bits(imported_params, params)


def test_files_that_lack_the_head(tmp_path, caplog):
  """The exported tower has none, which its config says; with part of a head, too."""
  model = tmp_path / "model"
  tiny_models.make_llava(model, **tiny_models.SIGLIP)
  file = model / "model.safetensors"
  tensors = load_file(file)
  del tensors["vision_tower.head.probe"]
  save_file(tensors, file, metadata={"format": "pt"})
  opened, graphdef, params = parity.open_model(model)
  out = tmp_path / "out"
  with caplog.at_level("WARNING"):
    export.export_model(opened, params, str(out))
  assert "has a pooling head, but its files lack it: the exported tower has none" in caplog.text
  exported = load_in_torch(str(out))
  assert not exported.config.vision_config.vision_use_head
  logits = our_logits(opened.config, graphdef, params)
  assert parity.relative_error(logits, torch_logits(exported, opened.config)) < 1e-5


@pytest.mark.parametrize("strategy", ["full", "default"])
def test_processor_of_an_export_makes_our_tokens_and_pixels(strategy, tmp_path):
  options = tiny_models.SIGLIP | {"vision_feature_select_strategy": strategy}
  tiny_models.make_llava(tmp_path / "in", **options)
  opened, _, params = parity.open_model(tmp_path / "in")
  export.export_model(opened, params, str(tmp_path / "out"))
  before, after = (
    json.loads((tmp_path / name / "preprocessor_config.json").read_text()) for name in ("in", "out")
  )
  assert {key: after[key] for key in before} == before
  processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
  assert type(processor).__name__ == "LlavaProcessor"
  assert type(processor.image_processor).__name__.startswith("SiglipImageProcessor")
  noise = np.random.default_rng(0).integers(0, 256, (40, 23, 3), np.uint8)
  pictures = [Image.fromarray(noise), Image.fromarray(noise[:7, ::-1])]
  prompt = "USER: <image>\nWhat is in <image>? ASSISTANT:"
  processed = processor(images=pictures, text=prompt, return_tensors="np")
  config = opened.config
  assert config.tokens_per_image == (9 if strategy == "full" else 8)
  repeated = prompt.replace("<image>", "<image>" * config.tokens_per_image)
  assert processed["input_ids"][0].tolist() == opened.tokenizer(repeated)["input_ids"]
  ours = [opened.images.preprocess(picture) for picture in pictures]
  np.testing.assert_allclose(
    processed["pixel_values"], parity.pixel_values(config, ours), rtol=0, atol=1e-6
  )


def test_adapters_equal_those_of_peft(tmp_path):
  """The head has maps of the names that adapters have in layers, and gets none."""
  torch_model = tiny_models.make_llava(tmp_path, **tiny_models.SIGLIP)
  vision = peft_models.VISION.replace(r"\d+", "[01]")
  options = {"vision_rank": 3, "targets": "/layers/"}
  assert peft_models.check_both_ways(torch_model, tmp_path, vision, **options) == {"vision"}


def test_a_new_model_reads_all_patches(directories):
  with pytest.raises(InputError, match=r"no class token .* model\.vision_feature_select_strategy"):
    assemble(directories, vision_feature_select_strategy="default")


def test_a_perceiver_takes_a_whole_grid(tmp_path):
  tiny_models.make_llava(tmp_path, **(tiny_models.SIGLIP | {"text": {"hidden_size": 128}}))
  file = tmp_path / "config.json"
  content = json.loads(file.read_text())
  content |= {"projector_type": "perceiver", "vision_feature_select_strategy": "default"}
  file.write_text(json.dumps(content))
  with pytest.raises(InputError, match="the perceiver projector takes all patches"):
    parity.open_model(tmp_path)


@pytest.mark.parametrize("side", [16, 21])
def test_a_perceiver_on_all_patches(side, tmp_path):
  """Its queries see as many keys as there are patches."""
  vision = tmp_path / "vision"
  tiny_models.make_siglip(vision, whole=False, image_size=side, patch_size=4)
  tiny_models.make_llama(tmp_path / "llama", hidden_size=128)
  keys = {"vision": str(vision), "language": str(tmp_path / "llama"), "projector": "perceiver"}
  opened = source.open_source(parity.model_group(**keys, **FULL))
  graphdef, params = parity.load_all(opened)
  model = vlm.nnx.merge(graphdef, params)
  assert not model.projector.has_class_token
  pictures = np.stack(list(parity.make_pictures(2, side).values()))
  features = model.vision_features(pictures[None])
  assert features.shape == (2, (side // 4) ** 2, 24)
  assert np.isfinite(model.projector(features)).all()


def test_other_towers_are_refused(directories, tmp_path):
  vision = transformers.Siglip2VisionConfig(hidden_size=24, num_attention_heads=2)
  vision.save_pretrained(tmp_path)
  with pytest.raises(
    InputError, match="'siglip2_vision_model'; supported: clip_vision_model, siglip_vision_model"
  ):
    assemble(directories, str(tmp_path))


def test_features_behind_the_last_norm_are_refused(directories, tmp_path):
  vision = tiny_models.vision_config("siglip_vision_model", tie_last_hidden_states=True)
  vision.save_pretrained(tmp_path)
  tiny_models.save_image_processor(tmp_path, 12, model_type="siglip_vision_model")
  with pytest.raises(InputError, match="tie_last_hidden_states, .* is not supported"):
    assemble(directories, str(tmp_path))


def test_pictures_that_are_not_square_are_refused(directories, tmp_path):
  vision = tiny_models.vision_config("siglip_vision_model", image_size=[12, 16])
  vision.save_pretrained(tmp_path)
  tiny_models.save_image_processor(tmp_path, 12, model_type="siglip_vision_model")
  with pytest.raises(InputError, match=r"image_size is .*12, 16.*; give the side of a square"):
    assemble(directories, str(tmp_path))


def test_the_layout_of_llavas_repository_has_no_other_towers(directories, tmp_path):
  tiny_models.make_llama(tmp_path)
  path = tmp_path / "config.json"
  content = json.loads(path.read_text())
  content |= {
    "architectures": ["LlavaLlamaForCausalLM"],
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": str(directories / "vision"),
  }
  path.write_text(json.dumps(content))
  with pytest.raises(InputError, match="'siglip_vision_model'.* only CLIP is supported"):
    parity.open_model(tmp_path)


def test_a_head_that_the_tower_cannot_have_is_refused(tmp_path):
  tiny_models.make_llava(tmp_path)
  path = tmp_path / "model.safetensors"
  stray = {"vision_tower.vision_model.head.probe": torch.ones(1, 1, 4)}
  save_file(load_file(path) | stray, path, {"format": "pt"})
  with pytest.raises(InputError, match="head.probe"):
    parity.open_model(tmp_path)
