"""What a run did not train leaves the project with the bits it came with, layers never run too."""

import glob

import pytest
import torch
import transformers
from safetensors.torch import load_file

from scripts import export_hf, train_sft
from tests import checkpoints, sft_run
from tests.weights.test_round_trip import load_in_torch
from vlalign_jax.weights import names

LORA = {"lora.rank": 2, "lora.targets": "attention/(query|value)", "train.projector": False}


def read_tensors(*directories: str) -> dict[str, torch.Tensor]:
  """Returns canonical name -> tensor of all safetensors files of model directories."""
  files = [
    file for place in directories for file in glob.glob(f"{place}/**/*.safetensors", recursive=True)
  ]
  return {names.canonical(name): x for file in files for name, x in load_file(file).items()}


def changed(before: dict, after: dict) -> set[str]:
  """Returns the names whose tensors differ in bits or dtype, new rows of a vocabulary aside."""
  return {
    name
    for name, tensor in after.items()
    if name not in before
    or tensor.dtype != before[name].dtype
    or not torch.equal(tensor[: len(before[name])], before[name])
  }


def vision_config(directory: str) -> dict:
  """Returns the vision tower's config as transformers reads it, without dtype and version."""
  content = transformers.AutoConfig.from_pretrained(directory).vision_config.to_dict()
  skipped = ("dtype", "transformers_version", "architectures", "_name_or_path")
  return {key: value for key, value in content.items() if key not in skipped}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Config keys that name records and their pictures."""
  root = tmp_path_factory.mktemp("data")
  records = sft_run.make_records(str(root / "images"), 8)
  train = sft_run.write_json(str(root / "train.json"), records)
  return {"data.train": train, "data.images": str(root / "images")}


def run_and_export(start: str, data: dict, place, **keys) -> str:
  """Trains two steps from a directory or a run, with a frozen tower; returns the export."""
  settings = {"train.vision": False, "steps": 2, "optim.warmup": 0.0, **data, **keys}
  train = settings.pop("data.train")
  config = sft_run.make_config(start, train, **settings)
  train_sft.train_and_evaluate(config, str(place / "run"))
  export_hf.export_run(str(place / "run"), str(place / "out"), None)
  return str(place / "out")


@pytest.mark.parametrize(
  ("layer", "keys", "trained"),
  [
    (-1, {}, ("projector.", "language.")),
    (-2, LORA, ("language.layers.",)),
    ([-3, -2], {"train.language": False}, ("projector.",)),
  ],
)
def test_tensors_that_were_not_trained(layer, keys, trained, data, tmp_path, compile_cache):
  source = str(tmp_path / "in")
  checkpoints.make_llava(source, vision_feature_layer=layer)
  out = run_and_export(source, data, tmp_path, **keys)
  before, after = read_tensors(source), read_tensors(out)
  assert after.keys() == before.keys()
  different = changed(before, after)
  assert different
  assert all(name.startswith(trained) for name in different)
  if keys is LORA:
    assert all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in different)
  assert vision_config(out) == vision_config(source)
  model = load_in_torch(out)
  assert model.config.vision_feature_layer == layer


def test_a_source_in_bfloat16(data, tmp_path, compile_cache):
  """Untrained tensors stay in the dtype they came in."""
  source = str(tmp_path / "in")
  checkpoints.make_llava(source, vision_feature_layer=-2).to(torch.bfloat16).save_pretrained(source)
  out = run_and_export(source, data, tmp_path, **{"train.language": False})
  before, after = read_tensors(source), read_tensors(out)
  assert {tensor.dtype for tensor in before.values()} == {torch.bfloat16}
  assert all(name.startswith("projector.") for name in changed(before, after))


def test_a_model_made_of_two_towers(data, tmp_path, compile_cache):
  checkpoints.make_clip(tmp_path / "clip", whole=True)
  checkpoints.make_llama(tmp_path / "llama")
  towers = {"model.vision": str(tmp_path / "clip"), "model.language": str(tmp_path / "llama")}
  keys = {"train.language": False, "train.embeddings": False, "optim.schedule": "constant"}
  out = run_and_export("", data, tmp_path, **towers, **keys)
  before = read_tensors(tmp_path / "clip", tmp_path / "llama")
  after = read_tensors(out)
  assert all(name.startswith("projector.") for name in changed(before, after))
  unused = {name for name in before if name.startswith("vision.")}
  assert unused <= after.keys()
  load_in_torch(out)


def test_a_chain_of_three_runs(data, tmp_path, compile_cache):
  source = str(tmp_path / "in")
  checkpoints.make_llava(source, vision_feature_layer=-2)
  start = source
  for number, keys in enumerate(({"train.language": False}, LORA, {"train.language": False})):
    place = tmp_path / str(number)
    place.mkdir()
    out = run_and_export(start, data, place, **keys)
    start = str(place / "run")
  different = changed(read_tensors(source), read_tensors(out))
  parts = ("projector.", "q_proj.weight", "v_proj.weight")
  assert all(name.startswith(parts[0]) or name.endswith(parts[1:]) for name in different)
  assert any(name.endswith("q_proj.weight") for name in different)
  assert vision_config(out) == vision_config(source)
  # The export is a model like any other: from it, too, nothing else changes.
  again = run_and_export(out, data, tmp_path, **{"train.language": False})
  assert all(
    name.startswith("projector.") for name in changed(read_tensors(out), read_tensors(again))
  )
