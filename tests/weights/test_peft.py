"""Tests exporting LoRA runs to Hugging Face and PEFT, importing them, and unsuitable adapters."""

import json
import logging
import os
import shutil
import types
import warnings

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from scripts import export_hf, train_sft
from tests import parity, peft_models, sft_run, tiny_models
from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.models.vlm import SCORE
from vlalign_jax.runs import checkpoints as run_checkpoints
from vlalign_jax.weights import export_adapters, load, provenance, source

LORA = {"rank": 4, "vision_rank": 2, "alpha": 6.0, "use_rslora": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A LoRA run that also trains the projector and the embedding, exported merged and as PEFT."""
  root = tmp_path_factory.mktemp("lora_run")
  tiny_models.make_llava(root / "llava")
  records = sft_run.make_records(str(root), 4)
  data = sft_run.write_json(root / "train.json", records)
  config = sft_run.make_config(
    str(root / "llava"),
    data,
    **{f"lora.{key}": value for key, value in LORA.items()},
    **{
      "lora.dropout": 0.1,
      "train.embeddings": True,
      "optim.learning_rate": 3e-2,
      "num_train_epochs": 2.0,
    },
    **{"model.dtype": "float32"},
  )
  train_sft.train_and_evaluate(config, str(root / "run"))
  export_hf.export_run(str(root / "run"), str(root / "merged"), None)
  export_hf.export_run(str(root / "run"), str(root / "peft"), None, adapters=True)
  return types.SimpleNamespace(
    root=root, llava=str(root / "llava"), run=str(root / "run"), peft=str(root / "peft"), data=data
  )


def config_for(run, init_from: str = "", **keys):
  """Returns `peft_models.config_for` for a run that trains the same parameters as `run`."""
  config = peft_models.config_for(run.llava, init_from=init_from, **(LORA | keys))
  config.train.embeddings = True
  return config


def open_model(run, init_from: str):
  opened = source.open_for(config_for(run, init_from))
  return opened, *parity.load_all(opened)


def example_rows(config):
  pictures = parity.make_pictures(2, config.vision.image_size)
  example = parity.make_example(config, 20, tuple(pictures))
  rows = parity.make_rows(config, [[example]], pictures, len(example.tokens), 2)
  return example, pictures, rows


def torch_logits(model, config):
  example, pictures, _ = example_rows(config)
  with torch.no_grad():
    return parity.torch_logits(model.eval(), config, example, pictures).numpy()


def our_logits(config, graphdef, params):
  return parity.logits(graphdef, params, example_rows(config)[2])[0]


def trained_of(run: str, opened) -> dict:
  """Returns path -> array of the parameters in a run's checkpoint."""
  _, abstract = parity.vlm.abstract_params(opened.config)
  leaves = trees.flatten(abstract)
  place = parity.meshes.replicated(
    parity.meshes.make_mesh(parity.defaults("sft").mesh, jax.devices()[:1])
  )
  step = run_checkpoints.find_step(run, "newest", "eval/loss")
  return run_checkpoints.restore_params(run, step, leaves, dict.fromkeys(leaves, place))


def on_hugging_face(model: str, adapter: str):
  """Returns the PeftModel of the two directories; fails if loading it warns."""
  base = transformers.LlavaForConditionalGeneration.from_pretrained(model)
  with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    return peft.PeftModel.from_pretrained(base, adapter)


def test_the_checkpoint_has_adapters_projector_and_embedding_only(run):
  opened = source.open_for(peft_models.config_for(run.llava, **LORA))
  trained = trained_of(run.run, opened)
  parts = {path.split("/")[0] if "lora_" not in path else "adapter" for path in trained}
  assert parts == {"adapter", "projector", "language"}
  assert [path for path in trained if path.startswith("language") and "lora_" not in path] == [
    "language/embedding/embedding"
  ]


def test_logits_equal_those_of_hugging_face(run):
  opened, graphdef, params = open_model(run, run.run)
  ours = our_logits(opened.config, graphdef, params)
  merged, merged_graphdef, merged_params = parity.open_model(str(run.root / "merged"))
  original = transformers.LlavaForConditionalGeneration.from_pretrained(run.llava)
  adapted = on_hugging_face(run.llava, run.peft)
  results = {
    "adapters": torch_logits(adapted, opened.config),
    "adapters merged by peft": torch_logits(adapted.merge_and_unload(), opened.config),
    "merged": torch_logits(
      transformers.LlavaForConditionalGeneration.from_pretrained(run.root / "merged"),
      opened.config,
    ),
    "merged, here": our_logits(merged.config, merged_graphdef, merged_params),
  }
  for name, logits in results.items():
    assert parity.relative_error(logits, ours) < 1e-5, name
  assert parity.relative_error(torch_logits(original, opened.config), ours) > 0.1


def test_exported_adapters_import_with_the_same_bits(run):
  opened, _, params = open_model(run, run.peft)
  trained = trained_of(run.run, opened)
  imported = trees.flatten(params)
  assert any("lora_b" in path for path in trained)
  for path, array in trained.items():
    np.testing.assert_array_equal(imported[path], array, err_msg=path)
  _, restored = parity.load_all(source.open_for(config_for(run, run.run)))
  for path, array in trees.flatten(restored).items():
    np.testing.assert_array_equal(imported[path], array, err_msg=path)


def test_adapters_on_adapters(run, tmp_path):
  """A LoRA run starts from a LoRA run, whose adapters are merged into its weights."""
  config = sft_run.make_config(
    run.run, run.data, **{"lora.rank": 2, "train.projector": False, "train.vision": False}
  )
  config.max_steps = 2
  train_sft.train_and_evaluate(config, str(tmp_path / "second"))
  export_hf.export_run(str(tmp_path / "second"), str(tmp_path / "peft"), None, adapters=True)
  merged, graphdef, params = parity.open_model(str(tmp_path / "second"))
  ours = our_logits(merged.config, graphdef, params)
  adapted = on_hugging_face(str(run.root / "merged"), str(tmp_path / "peft"))
  assert parity.relative_error(torch_logits(adapted, merged.config), ours) < 1e-5


def test_adapters_of_other_weights_are_refused(run, tmp_path):
  config = config_for(run, run.run)
  config.model.init_from = run.run
  with pytest.raises(InputError, match="would be added twice; name what that run started from"):
    source.open_for(config)
  tiny_models.make_llava(tmp_path / "other", seed=8)
  config.model.init_from = str(tmp_path / "other")
  with pytest.raises(InputError, match="belong to other weights than .*other; name those: .*llava"):
    source.open_for(config)
  # The same weights in another place are the same.
  shutil.copytree(run.llava, tmp_path / "moved")
  config.model.init_from = str(tmp_path / "moved")
  assert source.open_for(config).start.run[0] == run.run


def test_changed_adapters_are_refused(run, tmp_path):
  """A resumed run needs the adapters that it started from."""
  copied = str(tmp_path / "peft")
  shutil.copytree(run.peft, copied)
  opened = source.open_for(config_for(run, copied))
  os.makedirs(tmp_path / "run" / "model")
  provenance.write(opened, str(tmp_path / "run"))
  assert provenance.check(opened, str(tmp_path / "run")) == opened
  tensors = load_file(os.path.join(copied, "adapter_model.safetensors"))
  save_file(
    {name: 2 * tensor for name, tensor in tensors.items()}, copied + "/adapter_model.safetensors"
  )
  with pytest.raises(InputError, match="other weights than are there now .*adapter_model"):
    provenance.check(opened, str(tmp_path / "run"))
  of_run = source.open_for(config_for(run, run.run))
  provenance.write(of_run, str(tmp_path / "run"))
  assert provenance.check(of_run, str(tmp_path / "run")).start == of_run.start


def test_a_score_head_with_adapters(run, tmp_path):
  config = peft_models.config_for(run.llava, **LORA)
  opened = source.open_for(config, SCORE)
  _, params = parity.load_all(opened)
  flat = trees.flatten(params)
  kept = {path: array for path, array in flat.items() if "lora_" in path or "score/" in path}
  export_adapters.export_adapters(opened.config, kept, str(tmp_path / "peft"))
  config.lora.init_from = str(tmp_path / "peft")
  _, imported = parity.load_all(source.open_for(config, SCORE), seed=5)
  for path in kept:
    np.testing.assert_array_equal(trees.flatten(imported)[path], kept[path], err_msg=path)
  with pytest.raises(InputError, match="score.weight"):
    source.open_for(peft_models.config_for(run.llava, init_from=str(tmp_path / "peft"), **LORA))

  class Scoring(transformers.LlavaForConditionalGeneration):
    def __init__(self, hf):
      super().__init__(hf)
      self.score = torch.nn.Linear(hf.text_config.hidden_size, 1, bias=False)

  logging.getLogger("transformers").setLevel(logging.ERROR)
  scoring = peft.PeftModel.from_pretrained(Scoring.from_pretrained(run.llava), tmp_path / "peft")
  head = scoring.base_model.model.score.modules_to_save["default"].weight
  np.testing.assert_array_equal(head.detach().numpy().T, flat["score/kernel"])


def test_projector_with_adapters_and_fully_trained(run, tmp_path):
  keys = LORA | {"targets": "/layers/|projector"}
  opened, graphdef, params = peft_models.open_model(run.llava, **keys)
  params = trees.map_paths(lambda path, x: x + 0.1 if path.endswith("lora_b") else x, params)
  flat = trees.flatten(params)
  kept = {path: x for path, x in flat.items() if "lora_" in path or "projector" in path}
  export_adapters.export_adapters(opened.config, kept, str(tmp_path / "peft"))
  adapted = on_hugging_face(run.llava, str(tmp_path / "peft"))
  ours = our_logits(opened.config, graphdef, params)
  assert parity.relative_error(torch_logits(adapted, opened.config), ours) < 1e-5


@pytest.mark.parametrize(
  ("path", "tied", "message"),
  [
    ("language/norm/scale", False, "norm/scale was trained, and PEFT has .*without --adapters"),
    ("language/embedding/embedding", True, "tied to the output head.*without --adapters"),
  ],
)
def test_parameters_that_peft_has_no_place_for(path, tied, message, tmp_path):
  tiny_models.make_llava(tmp_path / "llava", text={"tie_word_embeddings": tied})
  opened = source.open_for(peft_models.config_for(tmp_path / "llava", rank=2))
  with pytest.raises(InputError, match=message):
    export_adapters.export_adapters(opened.config, {path: None}, str(tmp_path / "out"))
  assert not os.path.exists(tmp_path / "out")


def break_config(**keys):
  def change(directory):
    path = os.path.join(directory, "adapter_config.json")
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
    sft_run.write_json(path, content | keys)

  return change


def break_tensors(change_tensors):
  def change(directory):
    path = os.path.join(directory, "adapter_model.safetensors")
    save_file(change_tensors(load_file(path)), path)

  return change


QUERY = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_A.weight"
NORM = "base_model.model.model.language_model.norm.weight"
BAD = {
  "DoRA": (break_config(use_dora=True), {}, "use_dora = true: only plain LoRA"),
  "bias": (break_config(bias="all"), {}, 'bias = "all": only plain LoRA'),
  "PiSSA": (break_config(init_lora_weights="pissa"), {}, "init_lora_weights"),
  "another method": (break_config(peft_type="IA3"), {}, "peft_type is 'IA3'; only LORA"),
  "no rank": (break_config(r=None), {}, "r is None; it must be a positive number"),
  "no config": (lambda d: os.remove(d + "/adapter_config.json"), {}, "is not a PEFT directory"),
  "no tensors": (lambda d: os.remove(d + "/adapter_model.safetensors"), {}, "as safetensors"),
  "cut off": (
    lambda d: os.truncate(d + "/adapter_model.safetensors", 500),
    {},
    "damaged or cut off",
  ),
  "a layer is missing": (
    break_tensors(lambda tensors: {name: x for name, x in tensors.items() if name != QUERY}),
    {},
    "missing base_model.*layers.1.self_attn.q_proj.lora_A",
  ),
  "an unknown tensor": (
    break_tensors(lambda x: x | {"base_model.model.model.other.weight": x[QUERY].clone()}),
    {},
    r"unexpected base_model.model.model.other.weight",
  ),
  "another shape": (
    break_tensors(lambda tensors: tensors | {QUERY: tensors[QUERY][:, :-1].contiguous()}),
    {},
    r"layers.1.self_attn.q_proj.lora_A.weight is \(4, 31\), not \(4, 32\)",
  ),
  "another rank": (None, {"rank": 8}, "query: rank 4 there, 8 by lora.rank"),
  "another scale": (None, {"alpha": 3.0}, "query: scale 3 there, 1.5 by lora.alpha"),
  "fewer targets": (None, {"targets": "/attention/"}, "mlp/up: an adapter there, none by"),
  "a trained norm": (
    break_tensors(lambda tensors: tensors | {NORM: tensors[QUERY][0].clone()}),
    {},
    r"language/norm/scale were trained .*; merge all of them \(merge_and_unload in peft\)",
  ),
  "more targets": (None, {"targets": "/layers/|projector"}, "projector/first: no adapter there"),
}


@pytest.mark.parametrize("name", BAD)
def test_adapters_that_do_not_fit(name, run, tmp_path):
  change, keys, message = BAD[name]
  directory = str(tmp_path / "peft")
  shutil.copytree(run.peft, directory)
  if change:
    change(directory)
  config = config_for(run, directory, **keys)
  with pytest.raises(InputError, match=message):
    load.check_weights(source.open_for(config))


def test_adapters_with_a_projector_that_would_be_frozen(run):
  for where in (run.peft, run.run):
    config = config_for(run, where)
    config.train.projector = False
    with pytest.raises(
      InputError, match=r"projector/first/kernel.*set config.train.projector to true"
    ):
      source.open_for(config)


def test_runs_without_adapters(run, tmp_path):
  shutil.copytree(run.run, tmp_path / "plain")
  config = json.loads((tmp_path / "plain" / "config.json").read_text())
  config["lora"] |= {"rank": 0, "vision_rank": 0}
  sft_run.write_json(tmp_path / "plain" / "config.json", config)
  with pytest.raises(InputError, match="is a run without adapters; name it as model.init_from"):
    source.open_for(peft_models.config_for(run.llava, init_from=str(tmp_path / "plain"), **LORA))
  with pytest.raises(InputError, match="trained no adapters; export it without"):
    export_hf.export_run(str(tmp_path / "plain"), str(tmp_path / "out"), None, adapters=True)
