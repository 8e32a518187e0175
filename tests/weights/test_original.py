"""Tests importing checkpoints of Vision-LLM-Alignment, which torch writes with its names."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file

from scripts import import_hf
from tests import parity, sft_run
from tests.weights import original_model
from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.models.vlm import SCORE
from vlalign_jax.weights import original


def import_from(root, name: str = "imported", **options) -> str:
  """Imports root/saved; returns the output directory."""
  output = str(root / name)
  towers = {"vision": str(root / "clip"), "language": str(root / "llama")}
  options = {"allow_pickle": True} | towers | options
  import_hf.import_original(str(root / "saved"), output, **options)
  return output


def error_of(model, directory: str) -> float:
  """Returns the relative error of the imported model's logits, compared with torch's."""
  source, graphdef, params = parity.open_model(directory)
  example, pictures, tokens, pixels = original_model.example_of(source.config)
  rows = parity.make_rows(source.config, [[example]], pictures, len(example.tokens), 2)
  with torch.no_grad():
    expected = model.logits(tokens, pixels, source.config.image_token_id)
  return parity.relative_error(parity.logits(graphdef, params, rows)[0], expected)


def test_the_same_logits(tmp_path):
  model = original_model.make(tmp_path)
  # Buffers that older versions saved, and the decoder's embedding, which the original never trains.
  old = {
    "vis_encoder.vision_model.embeddings.position_ids": torch.arange(10)[None],
    "lang_decoder.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
  }
  original_model.save(model, tmp_path / "saved", **old)
  imported = import_from(tmp_path)
  assert error_of(model, imported) < 1e-5
  source, _, params = parity.open_model(imported)
  assert source.config.projector.kind == "linear"
  assert source.config.vision.keep_class_token
  assert not source.config.language.tied_embeddings
  embedding = trees.flatten(params)["language/embedding/embedding"]
  np.testing.assert_array_equal(embedding, model.lang_embed.weight.detach().numpy())
  # The tower is complete, with a norm that the original never applies.
  tower = load_file(f"{imported}/vision/model.safetensors")
  for part, param in model.vis_encoder.post_layernorm.named_parameters():
    assert torch.equal(tower[f"vision_model.post_layernorm.{part}"], param)
  # The heading is split into words, as in the original's training; <image> is one token.
  assert original_model.heading_in(tmp_path / "saved")
  words = source.tokenizer.tokenize("### Image:\n<image>")
  assert words[0] == "###"
  assert words[-1] == "<image>"
  assert len(source.tokenizer) == len(original_model.tokenizer())
  assert source.config.image_token_id == source.tokenizer.convert_tokens_to_ids("<image>")


@pytest.mark.parametrize("projector", ["vit", "perceiver"])
def test_other_projectors_and_multi_modal_causal_attention(projector, tmp_path):
  model = original_model.make(tmp_path, projector, hidden_size=128)
  original_model.save(model, tmp_path / "saved")
  imported = import_from(tmp_path)
  assert error_of(model, imported) < 1e-5
  source = parity.open_model(imported)[0]
  assert source.config.projector.kind == projector
  assert not source.config.mmca
  with_mmca = import_from(tmp_path, "mmca", mmca=True)
  assert parity.open_model(with_mmca)[0].config.mmca


def test_without_a_tokenizer_and_in_bfloat16(tmp_path):
  """The original unties a language model's head and embedding."""
  model = original_model.make(tmp_path, tie_word_embeddings=True).bfloat16()
  original_model.save(model, tmp_path / "saved", with_tokenizer=False)
  imported = import_from(tmp_path)
  source, _, params = parity.open_model(imported, param_dtype="bfloat16")
  saved = original_model.tokenizer()
  assert len(source.tokenizer) == len(saved)
  assert source.config.image_token_id == saved.convert_tokens_to_ids("<image>")
  expected = {
    "language/embedding/embedding": model.lang_embed.weight,
    "language/head/kernel": model.lang_decoder.lm_head.weight.T,
    "projector/linear/kernel": model.projection[0].weight.T,
  }
  for path, tensor in expected.items():
    param = trees.flatten(params)[path]
    assert param.dtype == "bfloat16"
    np.testing.assert_array_equal(param.astype("float32"), tensor.detach().float().numpy())
  # Under ZeRO 3 the original saves a tied head once, as the decoder's embedding.
  path = tmp_path / "saved" / original.WEIGHTS
  state = torch.load(path)
  del state["lang_decoder.lm_head.weight"]
  torch.save(state, path)
  tied = parity.open_model(import_from(tmp_path, "tied"), param_dtype="bfloat16")[2]
  for path, array in trees.flatten(params).items():
    np.testing.assert_array_equal(trees.flatten(tied)[path], array, err_msg=path)


def test_a_reward_model_gives_the_same_scores(tmp_path):
  model = original_model.make(tmp_path)
  reward = original_model.Reward(model).eval()
  # With adapters the original keeps its decoder twice, under two names.
  twice = {f"lang_decoder.{k}": v for k, v in model.lang_decoder.state_dict().items()}
  original_model.save(reward, tmp_path / "saved", **twice)
  # With a reward model it writes the language model's config, which says whether it has MMCA.
  sft_run.write_json(tmp_path / "saved" / "config.json", {"enable_mmca_attention": True})
  assert parity.open_model(import_from(tmp_path, "mmca"))[0].config.mmca
  sft_run.write_json(tmp_path / "saved" / "config.json", {"enable_mmca_attention": False})
  source, graphdef, params = parity.open_model(import_from(tmp_path))
  assert source.config.head == SCORE
  example, pictures, tokens, pixels = original_model.example_of(source.config)
  length = len(example.tokens)
  rows = parity.make_rows(source.config, [[example]], pictures, length + 4, 2)
  places = np.array([[[length - 1, 3]]], np.int32)
  module = nnx.merge(graphdef, params)
  scores = module.scores(module(rows), places)[0, 0]
  with torch.no_grad():
    hidden = model.hidden(tokens, pixels, source.config.image_token_id)
    expected = reward.v_head(hidden[places[0, 0]])[:, 0]
  assert parity.relative_error(scores, expected) < 1e-5
  original_model.save(reward, tmp_path / "saved", **{name: 2 * x for name, x in twice.items()})
  with pytest.raises(InputError, match=r"rwtranrsformer\.lang_decoder.*same parameter, but dif"):
    import_from(tmp_path, "again")


def test_adapters(tmp_path):
  model = original_model.make(tmp_path)
  adapters = original_model.adapt(model)
  assert len(adapters) == 14
  original_model.save(model, tmp_path / "saved")
  with pytest.raises(InputError, match="add --lora=merged if one of them saved this"):
    import_from(tmp_path)
  imported = import_from(tmp_path, lora="separate")
  assert error_of(model, imported) < 1e-5
  for adapter in adapters:
    adapter.merge()
  original_model.save(model, tmp_path / "saved")
  merged = import_from(tmp_path, "merged", lora="merged")
  assert error_of(model, merged) > 1e-2  # the torch model adds the adapters again
  for adapter in adapters:
    adapter.lora_left_weight.data.zero_()
  assert error_of(model, merged) < 1e-5


def test_refused_without_the_flag(tmp_path):
  original_model.save(original_model.make(tmp_path), tmp_path / "saved")
  with pytest.raises(InputError, match=r"is a pickle, and a pickle may hold code .*--allow-pickle"):
    import_from(tmp_path, allow_pickle=False)
  assert not os.path.exists(tmp_path / "imported")


class Harmful:
  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return open, (self.path, "w")


def test_code_in_a_pickle_does_not_run(tmp_path):
  original_model.save(original_model.make(tmp_path), tmp_path / "saved")
  written = tmp_path / "written"
  torch.save({"x": Harmful(written)}, tmp_path / "saved" / original.WEIGHTS)
  with pytest.raises(InputError, match="not tensors alone"):
    import_from(tmp_path)
  assert not written.exists()


def rewrite(change):
  def apply(path):
    torch.save(change(torch.load(path)), path)

  return apply


BAD = {
  "no file": (os.remove, r"pytorch_model\.bin is missing; the original saves one"),
  "cut off": (lambda path: os.truncate(path, 5000), "damaged, or not tensors alone"),
  "empty": (lambda path: os.truncate(path, 0), "damaged, or not tensors alone"),
  "no state_dict": (rewrite(lambda state: list(state.values())), "not a state_dict"),
  "another project's": (
    rewrite(lambda state: {f"model.{name}": x for name, x in state.items()}),
    "no tensors of a `projection` of Vision-LLM-Alignment",
  ),
  "no embedding": (
    rewrite(lambda state: {k: v for k, v in state.items() if k != "lang_embed.weight"}),
    "no lang_embed.weight",
  ),
  "a tensor of no module": (
    rewrite(lambda state: state | {"pos_embedding.weight": torch.ones(2, 3)}),
    r"unexpected pos_embedding.weight \(2, 3\)",
  ),
  "a layer is missing": (
    rewrite(lambda state: {k: v for k, v in state.items() if ".layers.1.mlp.up" not in k}),
    r"missing language.layers.1.mlp.up_proj.weight \(48, 32\)",
  ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  root = tmp_path_factory.mktemp("original")
  original_model.save(original_model.make(root), root / "saved")
  return root


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints(name, saved):
  change, message = BAD[name]
  path = saved / "saved" / original.WEIGHTS
  before = path.read_bytes()
  change(path)
  with pytest.raises(InputError, match=message):
    import_from(saved)
  path.write_bytes(before)
  assert not os.path.exists(saved / "imported")


def test_command_line(saved):
  """Flags have their values after "=" or as the next argument; the error is all that is printed."""
  command = [sys.executable, "scripts/import_hf.py", "--from-original", str(saved / "saved")]
  command += [f"--vision={saved}/clip", "--language", f"{saved}/llama"]
  command += [f"--output={saved}/script", "--noallow-pickle", "--mmca", "--lora=merged"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
  assert (done.returncode, done.stdout) == (1, "")
  assert done.stderr.startswith(f"error: {saved}/saved/pytorch_model.bin is a pickle, and a pickle")
  assert done.stderr.count("\n") == 1
