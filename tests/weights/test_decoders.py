"""Tests language models other than LLaMA: separate towers, adapters, and unsupported models."""

import numpy as np
import pytest
import torch
import transformers

from tests import parity, peft_models, tiny_models
from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.weights import export, load, source


def test_a_separate_tower(tmp_path):
  tiny_models.make_clip(tmp_path / "clip", whole=False)
  model = tiny_models.make_llama(tmp_path / "qwen2", **tiny_models.QWEN2_WINDOW)
  group = parity.model_group(vision=f"{tmp_path}/clip", language=f"{tmp_path}/qwen2")
  opened = source.open_source(group)
  assert (opened.config.language.sliding_window, opened.config.language.qkv_bias) == (7, True)
  load.check_weights(opened)
  _, params = parity.load_all(opened)
  bias = trees.flatten(params)["language/layers/attention/key/bias"]
  torch_layers = model.model.layers
  expected = [layer.self_attn.k_proj.bias.detach().numpy() for layer in torch_layers]
  np.testing.assert_array_equal(bias, expected)


def test_a_tower_is_exported_as_its_class_reads_it(tmp_path):
  tiny_models.make_clip(tmp_path / "clip", whole=False)
  model = tiny_models.make_llama(tmp_path / "qwen3", **tiny_models.QWEN3_WINDOW)
  group = parity.model_group(
    vision=f"{tmp_path}/clip", language=f"{tmp_path}/qwen3", projector="vit"
  )
  opened = source.open_source(group)
  export.export_model(opened, parity.load_all(opened)[1], str(tmp_path / "out"))
  exported, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out/language", output_loading_info=True
  )
  assert not any(info.values()), info
  assert type(exported) is type(model)
  rows = model.get_input_embeddings().num_embeddings  # <image> and a pad token follow
  for name, tensor in model.state_dict().items():
    assert torch.equal(exported.state_dict()[name][:rows], tensor), name


@pytest.mark.parametrize("text", [tiny_models.QWEN2_WINDOW, tiny_models.QWEN3_WINDOW])
def test_adapters_equal_those_of_peft(text, tmp_path):
  torch_model = tiny_models.make_llava(tmp_path, text=text)
  options = {"rank": 3, "targets": "language/layers"}
  parts = peft_models.check_both_ways(torch_model, tmp_path, peft_models.LANGUAGE, **options)
  assert parts == {"language"}


@pytest.mark.parametrize("text", [tiny_models.QWEN2_WINDOW, tiny_models.QWEN3_WINDOW])
def test_windows_in_some_layers_only_are_refused(text, tmp_path):
  tiny_models.make_llava(tmp_path, text=text | {"max_window_layers": 1})
  message = r"different kinds of attention \(full_attention, sliding_attention\)"
  with pytest.raises(InputError, match=message):
    parity.open_model(tmp_path)


@pytest.mark.parametrize(
  "text",
  [
    tiny_models.QWEN2_WINDOW | {"use_sliding_window": False},
    tiny_models.QWEN3_WINDOW | {"use_sliding_window": False},
    tiny_models.MISTRAL_WINDOW | {"sliding_window": None},
  ],
)
def test_a_window_that_is_not_used(text, tmp_path):
  tiny_models.make_llava(tmp_path, text=text)
  opened = source.open_source(parity.model_group(init_from=str(tmp_path)))
  assert opened.config.language.sliding_window is None


def test_other_language_models_are_refused(tmp_path):
  tiny_models.make_llava(tmp_path, text={"model_type": "gemma"})
  with pytest.raises(InputError, match="type 'gemma'; supported: llama, mistral, qwen2, qwen3"):
    parity.open_model(tmp_path)
