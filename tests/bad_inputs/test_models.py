"""Tests the errors of model directories that are incomplete, damaged or of another model."""

import json
import os
import pathlib
import shutil

import pytest

from tests.bad_inputs.failing import fails
from vlalign_jax.errors import InputError


def _changed(name, **values):
  def change(directory):
    content = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps(content | values))

  return change


def _without(*names):
  def change(directory):
    for name in names:
      (directory / name).unlink()

  return change


def _with(name, text):
  return lambda directory: (directory / name).write_text(text)


BAD_MODELS = {
  "directory missing": (shutil.rmtree, ["no config.json there", "Hugging Face model directory"]),
  "config missing": (_without("config.json"), ["no config.json there"]),
  "config damaged": (_with("config.json", "{"), ["config.json", "not a valid JSON file"]),
  "config of another model": (
    _changed("config.json", model_type="bert"),
    ["a model of type 'bert'; supported: llava"],
  ),
  "config of an unknown model": (
    _changed("config.json", model_type="wuff"),
    ["config.json", "model type `wuff`"],
  ),
  "tokenizer missing": (
    _without("tokenizer.json", "tokenizer_config.json"),
    ["no tokenizer.json", "copy the tokenizer's files"],
  ),
  "tokenizer damaged": (_with("tokenizer.json", "{"), ["tokenizer cannot be loaded", "copy"]),
  "processor missing": (
    _without("preprocessor_config.json"),
    ["no preprocessor_config.json", "copy it from the model whose vision tower this is"],
  ),
  "processor of another size": (
    _changed(
      "preprocessor_config.json",
      size={"shortest_edge": 20},
      crop_size={"height": 20, "width": 20},
    ),
    ["makes 20 x 20 pictures", "vision tower takes 12 x 12", "correct preprocessor_config.json"],
  ),
  "another image token": (
    _changed("config.json", image_token_index=7, image_token_id=7),
    ["image_token_index 7", "the tokenizer has <image> at", "correct"],
  ),
  "generation config damaged": (_with("generation_config.json", "{"), ["generation_config.json"]),
  "weights missing": (_without("model.safetensors"), ["no model.safetensors"]),
  "pickled weights only": (
    lambda directory: (directory / "model.safetensors").rename(directory / "pytorch_model.bin"),
    ["only pickled weights", "not read", "save them as safetensors"],
  ),
  "weights cut off": (
    lambda directory: os.truncate(directory / "model.safetensors", 9000),
    ["model.safetensors: damaged or cut off", "copy it again"],
  ),
  "shard missing": (
    _with("model.safetensors.index.json", '{"weight_map": {"x": "model-2.safetensors"}}'),
    ["model.safetensors.index.json", "missing: model-2.safetensors"],
  ),
  "index damaged": (
    _with("model.safetensors.index.json", "[]"),
    ["model.safetensors.index.json: not a safetensors index"],
  ),
  "feature layer": (
    _changed("config.json", vision_feature_layer=9),
    ["vision_feature_layer 9 of a tower with 3 layers", "choose from -4 to 3"],
  ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model(train, records, model, tmp_path, name):
  change, expected = BAD_MODELS[name]
  copy = pathlib.Path(shutil.copytree(model, tmp_path / "model"))
  change(copy)
  fails([str(copy), *expected], train, records, **{"model.init_from": str(copy)})


def test_tensors_that_do_not_fit(train, records, model, tmp_path):
  copy = pathlib.Path(shutil.copytree(model, tmp_path / "model"))
  text_config = json.loads((copy / "config.json").read_text())["text_config"]
  _changed("config.json", text_config=text_config | {"intermediate_size": 64})(copy)
  with pytest.raises(InputError, match="6 tensors do not fit.*\n.*mlp.*is .*48.*not .*64"):
    train(records, **{"model.init_from": str(copy)})


def test_bad_choice_of_model(train, records, model):
  both = "give either model.init_from"
  fails([both], train, records, **{"model.vision": str(model)})
  fails([both], train, records, **{"model.init_from": ""})
  towers = {"model.init_from": "", "model.vision": str(model)}
  fails(["model.language is empty", "a LLaMA directory"], train, records, **towers)
  towers["model.language"] = str(model)
  fails([str(model), "language model of type 'llava'"], train, records, **towers)
