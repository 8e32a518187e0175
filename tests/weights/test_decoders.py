"""Tests language models other than LLaMA: separate towers, adapters, and unsupported models."""

import numpy as np
import pytest
import torch
import transformers

from tests import parity, peft_models, tiny_models
from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.weights import export_adapters, load, source


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


def test_adapters_equal_those_of_peft(tmp_path):
  torch_model = tiny_models.make_llava(tmp_path, text=tiny_models.QWEN2_WINDOW)
  adapted = peft_models.add(
    torch_model, r=3, lora_alpha=6, lora_dropout=0.0, target_modules=peft_models.LANGUAGE
  )
  adapted.save_pretrained(tmp_path / "peft")
  opened, graphdef, params = peft_models.open_model(
    str(tmp_path), rank=3, alpha=6.0, targets="language/layers", init_from=f"{tmp_path}/peft"
  )
  config = opened.config
  pictures = parity.make_pictures(1, config.vision.image_size)
  example = parity.make_example(config, 20, tuple(pictures))
  rows = parity.make_rows(config, [[example]], pictures, len(example.tokens), 1)
  with torch.no_grad():
    expected = parity.torch_logits(adapted, config, example, pictures)
  assert parity.relative_error(parity.logits(graphdef, params, rows)[0], expected) < 1e-5
  kept = {path: x for path, x in trees.flatten(params).items() if "lora_" in path}
  export_adapters.export_adapters(config, kept, str(tmp_path / "out"))
  base = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
  exported = peft_models.peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
  with torch.no_grad():
    logits = parity.torch_logits(exported, config, example, pictures)
  assert parity.relative_error(logits, expected) < 1e-5


def test_windows_in_some_layers_only_are_refused(tmp_path):
  mixed = tiny_models.QWEN2_WINDOW | {"max_window_layers": 1}
  tiny_models.make_llava(tmp_path, text=mixed)
  message = r"different kinds of attention \(full_attention, sliding_attention\)"
  with pytest.raises(InputError, match=message):
    parity.open_model(tmp_path)


@pytest.mark.parametrize(
  "text",
  [
    tiny_models.QWEN2_WINDOW | {"use_sliding_window": False},
    tiny_models.MISTRAL_WINDOW | {"sliding_window": None},
  ],
)
def test_a_window_that_is_not_used(text, tmp_path):
  tiny_models.make_llava(tmp_path, text=text)
  opened = source.open_source(parity.model_group(init_from=str(tmp_path)))
  assert opened.config.language.sliding_window is None


def test_other_language_models_are_refused(tmp_path):
  tiny_models.make_llava(tmp_path, text={"model_type": "gemma"})
  with pytest.raises(InputError, match="type 'gemma'; supported: llama, mistral, qwen2"):
    parity.open_model(tmp_path)
