"""Models whose pictures are several tiles: logits, exports, adapters and bad files."""

import json

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from tests import parity, peft_models, tiled_models, tiny_models
from tests.data.processors import noise
from tests.weights.round_trip import assert_same_bits, load_in_torch
from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.optim import optimizer
from vlalign_jax.weights import export, export_adapters, source

MODELS = list(tiled_models.MODELS)


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
  return tiled_models.make(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def examples(model):
  return [model.encoded(record) for record in tiled_models.records(model)]


def errors(model, logits, layout, torch_model=None) -> list[float]:
  """Returns the relative error of each example's logits."""
  relative = []
  for row, examples in zip(logits, layout, strict=True):
    start = 0
    for example in examples:
      stop = start + len(example.tokens)
      with torch.no_grad():
        expected = model.torch_logits(example, torch_model)
      relative.append(parity.relative_error(row[start:stop], expected))
      start = stop
  assert np.isfinite(logits).all()
  return relative


def logits_of(model, examples) -> np.ndarray:
  return parity.logits(model.graphdef, model.params, model.rows([examples]))


def test_logits_equal_torch(model, examples):
  """Of packed rows with one picture, several and none, some of them in both rows."""
  layout = tiled_models.layout_of(examples)
  logits = parity.logits(model.graphdef, model.params, model.rows(layout))
  assert max(errors(model, logits, layout)) < 1e-5


def test_rows_without_pictures(model, examples):
  layout = [[examples[0]], [examples[3]]]
  logits = parity.logits(model.graphdef, model.params, model.rows(layout, tiles=0))
  assert max(errors(model, logits, layout)) < 1e-5


def test_exports_load_in_torch_and_here(model, examples, tmp_path):
  out = str(tmp_path / "out")
  export.export_model(model.source, model.params, out)
  imported, _, params = parity.open_model(out)
  assert imported.config == model.config
  assert imported.layout == model.source.layout
  assert_same_bits(params, model.params)
  exported = load_in_torch(out, transformers.AutoModelForImageTextToText)
  assert type(exported) is type(model.torch_model)
  before, after = model.torch_model.state_dict(), exported.state_dict()
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    assert torch.equal(after[name], tensor), name
  processor = tiled_models.open_processor(model.name, out)
  assert type(processor) is type(model.processor)
  assert processor.to_dict() == model.processor.to_dict()
  assert max(errors(model, logits_of(model, examples), [examples], exported)) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_adapters_equal_those_of_peft(name, tmp_path):
  """With a projector that is trained whole."""
  made = tiled_models.make(name, tmp_path / "model")
  (example,) = [made.encoded(tiled_models.records(made)[2])]
  rows, length = made.rows([[example]]), len(example.tokens)
  adapted = peft_models.add(
    made.torch_model,
    r=3,
    lora_alpha=6,
    lora_dropout=0.0,
    target_modules=tiled_models.PEFT_LANGUAGE,
    modules_to_save=[tiled_models.PEFT_PROJECTOR[name]],
  )
  with torch.no_grad():
    for param in adapted.parameters():
      if param.requires_grad:
        param.add_(0.1)
  adapted.save_pretrained(tmp_path / "peft")
  lora = {"rank": 3, "targets": "language/layers", "alpha": 6.0}
  opened, graphdef, params = peft_models.open_model(
    made.directory, init_from=f"{tmp_path}/peft", **lora
  )
  with torch.no_grad():
    expected = made.torch_logits(example, adapted)
  found = parity.logits(graphdef, params, rows)[0, :length]
  assert parity.relative_error(found, expected) < 1e-5
  config = peft_models.config_for(made.directory, **lora)
  flat = trees.flatten(params)
  trained = {path: x for path, x in flat.items() if optimizer.is_trained(path, config)}
  assert any(path.startswith("projector/") for path in trained)
  if "projector/newline" in trained:  # PEFT saves modules, and this is a parameter
    trained["projector/newline"] = trained["projector/newline"] + 0.3
    flat["projector/newline"] = trained["projector/newline"]
    expected = parity.logits(graphdef, trees.unflatten(flat), rows)[0, :length]
  export_adapters.export_adapters(opened.config, trained, str(tmp_path / "out"))
  base = transformers.AutoModelForImageTextToText.from_pretrained(made.directory)
  with torch.no_grad():
    plain = made.torch_logits(example, base)
  exported = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
  with torch.no_grad():
    found = made.torch_logits(example, exported)
  assert parity.relative_error(found, expected) < 1e-5
  assert parity.relative_error(found, plain) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_adapters_of_both_towers_are_those_of_peft(name, tmp_path):
  """With another rank in the tower of vision."""
  made = tiled_models.make(name, tmp_path / "model")
  (example,) = [made.encoded(tiled_models.records(made)[1])]
  lora = {"rank": 3, "vision_rank": 2, "targets": "/layers/", "alpha": 6.0}
  opened, graphdef, params = peft_models.open_model(made.directory, **lora)
  flat = trees.flatten(params)
  rng = np.random.default_rng(0)
  for path, value in flat.items():
    if path.endswith("/lora_b"):
      flat[path] = jnp.asarray(0.3 * rng.standard_normal(value.shape, np.float32))
  expected = parity.logits(graphdef, trees.unflatten(flat), made.rows([[example]]))
  adapters = {path: x for path, x in flat.items() if "/lora_" in path}
  assert {path.split("/")[0] for path in adapters} == {"vision", "language"}
  export_adapters.export_adapters(opened.config, adapters, str(tmp_path / "out"))
  exported = peft.PeftModel.from_pretrained(made.torch_model, tmp_path / "out").eval()
  with torch.no_grad():
    found = made.torch_logits(example, exported)
  assert parity.relative_error(found, expected[0, : len(example.tokens)]) < 1e-5
  _, graphdef, again = peft_models.open_model(made.directory, init_from=f"{tmp_path}/out", **lora)
  for path, value in trees.flatten(again).items():
    np.testing.assert_array_equal(value, flat[path], err_msg=path)


def edit(directory, name: str, **changes) -> None:
  path = directory / name
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_grids_that_do_not_fit_are_refused(tmp_path):
  tiled_models.make_llava_next(tmp_path)
  edit(tmp_path, "config.json", image_grid_pinpoints=[[12, 24]])
  with pytest.raises(InputError, match=r"is \[\[12, 24\]\] in config.json and"):
    parity.open_model(tmp_path)
  processor = json.loads((tmp_path / "processor_config.json").read_text())
  processor["image_processor"]["image_grid_pinpoints"] = [[12, 25]]
  edit(tmp_path, "processor_config.json", **processor)
  edit(tmp_path, "config.json", image_grid_pinpoints=[[12, 25]])
  with pytest.raises(InputError, match="multiples of the vision tower's 12 pixels"):
    parity.open_model(tmp_path)


def test_features_that_are_not_a_grid_are_refused(tmp_path):
  tiled_models.make_llava_next(tmp_path, vision_feature_select_strategy="full")
  with pytest.raises(InputError, match="10 embeddings of a tile of 9 patches, .*; give default"):
    parity.open_model(tmp_path)


def test_processors_of_other_families_are_refused(tmp_path):
  tiled_models.make_llava_next(tmp_path)
  processor = json.loads((tmp_path / "processor_config.json").read_text())
  processor["image_processor"]["image_processor_type"] = "CLIPImageProcessor"
  edit(tmp_path, "processor_config.json", **processor)
  with pytest.raises(InputError, match="do_pad of a CLIPImageProcessor"):
    parity.open_model(tmp_path)
  processor["image_processor"]["do_pad"] = False
  edit(tmp_path, "processor_config.json", **processor)
  with pytest.raises(InputError, match="CLIPImageProcessor of a model of type 'llava_next'"):
    parity.open_model(tmp_path)


def test_internvl_files_that_contradict_each_other_are_refused(tmp_path):
  tiled_models.MODELS["internvl"](tmp_path)
  wrong = {
    "image_seq_length": (9, "image_seq_length is 9, and a tile has 4 embeddings"),
    "vision_feature_layer": ([-1, -2], r"vision_feature_layer is \[-1, -2\]; .* one layer"),
    "vision_feature_select_strategy": ("full", "17 embeddings of 16 patches"),
  }
  for key, (value, message) in wrong.items():
    before = (tmp_path / "config.json").read_text()
    edit(tmp_path, "config.json", **{key: value})
    with pytest.raises(InputError, match=message):
      parity.open_model(tmp_path)
    (tmp_path / "config.json").write_text(before)
  with pytest.raises(InputError, match="multi-modal causal attention is for LLaVA only"):
    source.open_source(parity.model_group(init_from=str(tmp_path), mmca=True))
  vision = json.loads((tmp_path / "config.json").read_text())["vision_config"]
  edit(tmp_path, "config.json", vision_config=vision | {"use_mean_pooling": False})
  with pytest.raises(InputError, match="use_mean_pooling of the vision tower is False, not True"):
    parity.open_model(tmp_path)


def test_internvl_marks_that_the_tokenizer_lacks_are_refused(tmp_path):
  tiled_models.MODELS["internvl"](tmp_path)
  path = tmp_path / "tokenizer_config.json"
  content = json.loads(path.read_text())
  content.pop("start_image_token")
  content["extra_special_tokens"] = {"context_image_token": "<IMG_CONTEXT>"}
  path.write_text(json.dumps(content))
  with pytest.raises(InputError, match="the tokenizer has no start_image_token"):
    parity.open_model(tmp_path)


def test_a_tower_of_whole_models_is_not_read_alone(tmp_path):
  tiled_models.MODELS["internvl"](tmp_path / "internvl")
  tiny_models.make_llama(tmp_path / "llama")
  group = parity.model_group(vision=f"{tmp_path}/internvl", language=f"{tmp_path}/llama")
  with pytest.raises(InputError, match="'internvl_vision' is a part of whole models only"):
    source.open_source(group)


def test_idefics3_files_that_do_not_fit_are_refused(tmp_path):
  tiled_models.make_idefics3(tmp_path)
  processor = json.loads((tmp_path / "processor_config.json").read_text())
  wrong = {
    "max_image_size": ({"longest_edge": 18}, "makes 18 x 18 pictures, its vision tower takes 12"),
    "do_resize": (False, "neither do_resize nor size.longest_edge bounds their tiles"),
  }
  for key, (value, message) in wrong.items():
    changed = processor["image_processor"] | {key: value}
    edit(tmp_path, "processor_config.json", image_processor=changed)
    with pytest.raises(InputError, match=message):
      parity.open_model(tmp_path)
  edit(tmp_path, "processor_config.json", **processor)
  tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
  for token in tokenizer["added_tokens"]:
    token["content"] = token["content"].replace("<global-img>", "<global>")
  (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
  with pytest.raises(InputError, match="no token <global-img>, which marks pictures"):
    parity.open_model(tmp_path)


@pytest.mark.parametrize("name", ["Idefics3", "SmolVLM"])
def test_a_tower_with_the_type_of_the_whole_model(name, tmp_path):
  """As published config.json of Idefics3 and SmolVLM have it."""
  tiled_models.make_idefics3(tmp_path / "in", name=name)
  vision = json.loads((tmp_path / "in" / "config.json").read_text())["vision_config"]
  more = {"model_type": name.lower(), "size": {"longest_edge": 36}, "use_base_siglip": True}
  edit(tmp_path / "in", "config.json", vision_config=vision | more)
  opened, _, params = parity.open_model(tmp_path / "in")
  export.export_model(opened, params, str(tmp_path / "out"))
  load_in_torch(str(tmp_path / "out"), transformers.AutoModelForImageTextToText)
  assert parity.open_model(tmp_path / "out")[0].config == opened.config


def test_grids_that_do_not_divide_into_squares_are_refused(tmp_path):
  tiled_models.make_idefics3(tmp_path)
  edit(tmp_path, "config.json", scale_factor=3)
  with pytest.raises(InputError, match="squares of 3 x 3 patches, and the vision tower has 4 in a"):
    parity.open_model(tmp_path)


def test_pictures_that_are_not_cut(tmp_path):
  """Each is one tile, whatever its size."""
  tiled_models.MODELS["idefics3"](tmp_path / "model", splits=False)
  opened, *_ = parity.open_model(tmp_path / "model")
  assert opened.config.most_tiles == opened.layout.most_tiles == 1
  picture = noise(50, 20)
  assert opened.images.tiles(picture).shape == (1, 12, 12, 3)
  assert opened.layout.tokens_of((50, 20)).tiles == 1
