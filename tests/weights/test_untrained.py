"""Tests that parameters which are not trained, and the architecture, are exported unchanged."""

import json
import os

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from scripts import export_hf, train_sft
from tests import parity, sft_run, tiny_models
from tests.weights.round_trip import load_in_torch, our_logits, torch_logits
from vlalign_jax.errors import InputError
from vlalign_jax.weights import export, names

BEHIND = "vision.encoder.layers.2."  # the third of three layers
LANGUAGE = "language."
TOWER = "vision."
PROJECTOR = "projector."


@pytest.fixture(scope="module")
def root(tmp_path_factory, compile_cache):
  """A directory with records and two towers for a new model."""
  root = tmp_path_factory.mktemp("untrained")
  record = sft_run.make_records(str(root / "data"), 1)[0]
  records = [record | {"id": str(number)} for number in range(8)]  # one shape of rows
  sft_run.write_json(root / "data" / "train.json", records)
  tiny_models.make_clip(root / "clip", whole=True)
  tiny_models.make_llama(root / "llama")
  return root


def train(root, model, workdir, **overrides):
  """Runs two steps of SFT with a frozen vision tower; returns the run directory."""
  settings = {
    "train.vision": False,
    "model.dtype": "float32",
    "optim.learning_rate": 0.1,
    "optim.warmup_ratio": 0.0,
    **overrides,
  }
  config = sft_run.make_config(model, root / "data" / "train.json", **settings)
  train_sft.train_and_evaluate(config, str(workdir))
  assert sft_run.read_metrics(workdir)[-1]["step"] == 2
  return str(workdir)


def exported(run, output, dtype=None):
  export_hf.export_run(str(run), str(output), dtype)
  return output


def stored(*places) -> dict[str, torch.Tensor]:
  """Returns canonical name -> tensor of weight files and of directories with model.safetensors."""
  tensors = {}
  for place in places:
    is_file = str(place).endswith(".safetensors")
    file = place if is_file else os.path.join(place, "model.safetensors")
    tensors |= {names.canonical(name): tensor for name, tensor in load_file(file).items()}
  return tensors


def bits(tensor: torch.Tensor) -> tuple:
  return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()


def assert_same_but(before: dict, after: dict, trained: tuple[str, ...]):
  """Checks that exactly the tensors whose names start with `trained` have changed."""
  assert before.keys() == after.keys()
  assert any(name.startswith(BEHIND) for name in before)
  assert "vision.post_layernorm.weight" in before
  for name, tensor in before.items():
    same = bits(tensor) == bits(after[name])
    assert same != name.startswith(trained), name


def config_of(directory) -> dict:
  with open(os.path.join(directory, "config.json"), encoding="utf-8") as file:
    return json.load(file)


def assert_same_tower(before, after):
  assert after["vision_config"] == before["vision_config"]
  assert after["vision_config"]["num_hidden_layers"] == 3
  assert after["vision_feature_layer"] == before["vision_feature_layer"]


FEATURES = {"-1": -1, "a list": [-3, 1]}  # -2: see the chain


@pytest.mark.parametrize("features", FEATURES)
def test_a_frozen_tower(features, root, tmp_path):
  """The language model is frozen as well: only the projector is trained."""
  model = tmp_path / "model"
  tiny_models.make_llava(model, vision_feature_layer=FEATURES[features])
  run = train(root, model, tmp_path / "run", **{"train.language": False})
  out = exported(run, tmp_path / "out")
  assert_same_but(stored(model), stored(out), (PROJECTOR,))
  assert_same_tower(config_of(model), config_of(out))
  # So is the config that the run keeps of its model.
  assert_same_tower(config_of(model), config_of(f"{run}/model"))


def test_a_chain_of_three_runs(root, tmp_path):
  """The later runs have adapters; transformers computes the same logits from the export."""
  model = tmp_path / "model"
  tiny_models.make_llava(model)
  first = train(root, model, tmp_path / "1", **{"train.language": False})
  out = exported(first, tmp_path / "out-1")
  assert_same_but(stored(model), stored(out), (PROJECTOR,))
  assert_same_tower(config_of(model), config_of(out))
  with_adapters = {"train.projector": False, "lora.rank": 2, "lora.vision_rank": 2}
  with_adapters["lora.targets"] = "/layers/mlp/up"
  second = train(root, first, tmp_path / "2", **with_adapters)
  third = train(root, second, tmp_path / "3", **with_adapters)
  out = exported(third, tmp_path / "out-3")
  adapted = tuple(
    name
    for name in stored(model)
    if name.endswith(("fc1.weight", "up_proj.weight")) and not name.startswith(BEHIND)
  )
  assert len(adapted) == 4
  assert_same_but(stored(model), stored(out), (PROJECTOR, *adapted))
  assert_same_tower(config_of(model), config_of(out))
  opened, graphdef, params = parity.open_model(third)
  torch_model = load_in_torch(str(out))
  theirs = torch_logits(torch_model, opened.config)
  assert parity.relative_error(our_logits(opened.config, graphdef, params), theirs) < 1e-5


def test_a_model_of_two_towers(root, tmp_path):
  towers = {
    "model.init_from": "",
    "model.vision": str(root / "clip"),
    "model.language": str(root / "llama"),
    "model.vision_feature_layer": "-2",
  }
  before = stored(root / "clip") | stored(root / "llama")
  before = {name: tensor for name, tensor in before.items() if name.startswith((TOWER, LANGUAGE))}
  clip = config_of(root / "clip")["vision_config"]
  for kind, in_parts in (("mlp", False), ("linear", True)):
    overrides = {**towers, "model.projector": kind, "train.language": False}
    run = train(root, "", tmp_path / f"run-{kind}", **overrides)
    if in_parts:
      run = train(root, run, tmp_path / "next", **{"train.language": False})
    out = exported(run, tmp_path / kind)
    written = config_of(out)
    assert written["vision_config"] == clip
    assert written["vision_config"]["num_hidden_layers"] == 3
    assert written["vision_feature_layer"] == -2
    if in_parts:
      after = stored(out / "vision", out / "language", out / "projector.safetensors")
      assert config_of(out / "vision")["num_hidden_layers"] == 3
      tower, info = transformers.CLIPVisionModel.from_pretrained(
        out / "vision", output_loading_info=True
      )
      assert not any(info.values()), info
      assert len(tower.encoder.layers) == 3
    else:
      after = stored(out)
      load_in_torch(str(out))
    after = {name: tensor for name, tensor in after.items() if not name.startswith(PROJECTOR)}
    for name in ("language.embed_tokens.weight", "language.lm_head.weight"):
      after[name] = after[name][: before[name].shape[0]]  # the vocabulary has grown
    assert_same_but(before, after, ("nothing",))
    # It is imported with the same tower.
    assert parity.open_model(out)[0].config.vision.layers == 2


def test_dtypes(root, tmp_path):
  """Untrained weights keep their dtype, or are converted from it to the dtype of the export."""
  model, half = tmp_path / "model", tmp_path / "half"
  tiny_models.make_llava(model)
  tiny_models.make_llava(half)
  tensors = load_file(half / "model.safetensors")
  tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
  # A subnormal value, which a device may flush to zero, stays as it is in the file.
  name = next(
    name for name in tensors if "language_model" in name and "layers.1.input_layernorm" in name
  )
  tensors[name][:2] = torch.tensor([1e-40, -0.0], dtype=torch.bfloat16)
  save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
  only = {"train.language": False}

  run = train(root, half, tmp_path / "run-half", **only)  # in float32
  out = exported(run, tmp_path / "out-half")
  after = stored(out)
  assert {n: t.dtype for n, t in after.items() if n.startswith(PROJECTOR)} == {
    n: torch.float32 for n in after if n.startswith(PROJECTOR)
  }
  assert_same_but(stored(half), after, (PROJECTOR,))
  assert load_in_torch(str(out)).dtype == torch.float32
  after = stored(exported(run, tmp_path / "out-full", "float32"))
  for name, tensor in stored(half).items():
    if not name.startswith(PROJECTOR):
      assert bits(tensor.float()) == bits(after[name])

  # Training in bfloat16 rounds the weights; an export in float32 has the values of the source.
  run = train(root, model, tmp_path / "run-rounded", **only, **{"model.param_dtype": "bfloat16"})
  assert_same_but(
    stored(model), stored(exported(run, tmp_path / "out-exact", "float32")), (PROJECTOR,)
  )


def without(directory, part: str) -> None:
  file = directory / "model.safetensors"
  tensors = {name: x for name, x in load_file(file).items() if part not in name}
  save_file(tensors, file, metadata={"format": "pt"})


def test_files_that_lack_unused_layers(tmp_path, caplog):
  """An exported tower ends where the source's files end, with a warning and the same features."""
  model = tmp_path / "model"
  tiny_models.make_llava(model, vision_feature_layer=[-3, -2])
  without(model, "encoder.layers.2.mlp.fc1.bias")
  without(model, "post_layernorm")
  opened, graphdef, params = parity.open_model(model)
  out = tmp_path / "out"
  with caplog.at_level("WARNING"):
    export.export_model(opened, params, str(out))
  assert "its files lack layer 2: the exported tower has 2 layers" in caplog.text
  assert "no post_layernorm; the identity is written in its place" in caplog.text
  written = config_of(out)
  assert written["vision_config"]["num_hidden_layers"] == 2
  assert written["vision_feature_layer"] == [-2, -1]
  assert parity.open_model(out)[0].config == opened.config
  theirs = torch_logits(load_in_torch(str(out)), opened.config)
  assert parity.relative_error(our_logits(opened.config, graphdef, params), theirs) < 1e-5
  # Layers that are run must exist.
  without(model, "encoder.layers.1.mlp.fc1.bias")
  with pytest.raises(InputError, match=r"missing vision\.encoder\.layers\.1\.mlp\.fc1\.bias"):
    parity.open_model(model)


def test_unused_layers_are_not_loaded(tmp_path):
  tiny_models.make_llava(tmp_path)
  opened, _, params = parity.open_model(tmp_path)
  assert opened.config.vision.layers == 2
  kernel = params["vision"]["layers"]["mlp"]["up"]["kernel"]
  assert np.shape(kernel) == (2, 24, 40)
