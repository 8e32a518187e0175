"""Tests directories that are converted on reading: PEFT adapters, and LLaVA's original layout."""

import json
import os

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from scripts import export_hf
from tests import parity, peft_models, tiny_models
from vlalign_jax.errors import InputError
from vlalign_jax.weights import provenance


def compare(directory, torch_model):
  """Compares the logits of a directory and of its export with torch's; returns the source."""
  opened, graphdef, params = parity.open_model(directory)
  config = opened.config
  pictures = parity.make_pictures(2, config.vision.image_size)
  example = parity.make_example(config, 20, tuple(pictures))
  rows = parity.make_rows(config, [[example]], pictures, len(example.tokens), 2)
  logits = parity.logits(graphdef, params, rows)[0]
  inputs = {"input_ids": torch.tensor(example.tokens)[None].long()}
  inputs["pixel_values"] = parity.pixel_values(config, [pictures[p] for p in example.images])
  output = f"{directory}-exported"
  export_hf.export_run(str(directory), output, None)
  exported = transformers.LlavaForConditionalGeneration.from_pretrained(output).eval()
  with torch.no_grad():
    expected = torch_model(**inputs).logits[0].numpy()
    exported_logits = exported(**inputs).logits[0].numpy()
  vocabulary = expected.shape[1]  # ours may have new tokens
  assert parity.relative_error(logits[:, :vocabulary], expected) < 1e-5
  assert parity.relative_error(exported_logits[:, :vocabulary], expected) < 1e-5
  return opened


def test_a_peft_directory_is_merged_into_its_base(tmp_path):
  model = tiny_models.make_llava(tmp_path / "base")
  modules = "|".join((peft_models.LANGUAGE, peft_models.VISION, peft_models.PROJECTOR))
  options = {"r": 3, "lora_alpha": 7, "alpha_pattern": {"q_proj": 5}, "use_rslora": True}
  adapted = peft_models.add(model, target_modules=modules, **options)
  adapted.save_pretrained(tmp_path / "peft")
  path = tmp_path / "peft" / "adapter_config.json"
  content = json.loads(path.read_text())

  def set_base(base):
    path.write_text(json.dumps(content | {"base_model_name_or_path": base}))

  set_base(str(tmp_path / "base"))
  opened = compare(tmp_path / "peft", adapted)
  files = provenance.content(opened)["files"]
  assert {os.path.basename(file) for file in files} == {
    "model.safetensors",
    "adapter_model.safetensors",
  }
  set_base("llava-hf/llava-1.5-7b-hf")
  with pytest.raises(InputError, match="base_model_name_or_path is 'llava-hf/llava"):
    parity.open_model(tmp_path / "peft")


LLAVA_KEYS = {
  "architectures": ["LlavaLlamaForCausalLM"],
  "model_type": "llava",
  "mm_projector_type": "mlp2x_gelu",
  "mm_hidden_size": 24,
  "mm_vision_select_layer": -2,
  "mm_vision_select_feature": "patch",
  "mm_use_im_start_end": False,
  "mm_use_im_patch_token": False,
  "image_aspect_ratio": "pad",
}
NAMES = (
  ("model.language_model.", "model."),
  ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
  ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
  ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
)


def make_original_layout(root, with_tower: bool, clip_path: str):
  """Writes root/llava in LLaVA's layout, and its CLIP; returns torch's model, its vocab_size."""
  model = tiny_models.make_llava(root / "hf")
  clip = tiny_models.make_clip(root / clip_path, whole=True)
  if not with_tower:
    state = clip.vision_model.state_dict()
    model.model.vision_tower.load_state_dict(state)
  tensors = {}
  for name, tensor in model.state_dict().items():
    if "vision_tower" in name and not with_tower:
      continue
    for new, old in NAMES:
      if name.startswith(new):
        name = old + name[len(new) :]
        break
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
      tensor = tensor[: len(tiny_models.make_tokenizer(image_token=False))]
    tensors[name] = tensor.clone()
  llava = root / "llava"
  os.makedirs(llava, exist_ok=True)
  save_file(tensors, llava / "model.safetensors", metadata={"format": "pt"})
  tiny_models.make_tokenizer(image_token=False).save_pretrained(llava)
  text = model.config.text_config.to_dict()
  vocab_size = tensors["lm_head.weight"].shape[0]
  named = os.path.relpath(root / clip_path, llava)
  content = text | LLAVA_KEYS | {"mm_vision_tower": named, "vocab_size": vocab_size}
  (llava / "config.json").write_text(json.dumps(content))
  return model, vocab_size


@pytest.mark.parametrize("with_tower", [True, False])
@pytest.mark.parametrize("clip_path", ["clip", "llava/vision_tower"])
def test_the_original_layout_is_converted(tmp_path, with_tower, clip_path):
  model, vocab_size = make_original_layout(tmp_path, with_tower, clip_path)
  assert vocab_size < model.config.image_token_id
  with torch.no_grad():  # the vocabulary of the files; <image> is the first token after it
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:vocab_size].clone())
  model.config.image_token_id = model.model.config.image_token_id = vocab_size
  opened = compare(tmp_path / "llava", model)
  assert opened.images.aspect == "pad"
  assert opened.config.image_token_id == vocab_size
  stored = load_file(tmp_path / "llava-exported" / "model.safetensors")
  assert stored["language_model.lm_head.weight"].shape[0] % 64 == 0
  written = json.loads((tmp_path / "llava-exported" / "config.json").read_text())
  assert written["architectures"] == ["LlavaForConditionalGeneration"]
  np.testing.assert_array_equal(
    stored["multi_modal_projector.linear_1.weight"],
    model.model.multi_modal_projector.linear_1.weight.detach(),
  )


def test_unsupported_models_of_the_original_layout(tmp_path):
  make_original_layout(tmp_path, True, "clip")
  path = tmp_path / "llava" / "config.json"
  content = json.loads(path.read_text())
  for changes, reason in (
    ({"mm_vision_tower": "openai/clip"}, "put that CLIP model into .*llava/vision_tower"),
    ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
    ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
  ):
    path.write_text(json.dumps(content | changes))
    with pytest.raises(InputError, match=reason):
      parity.open_model(tmp_path / "llava")


def test_an_older_processor_s_chat_template_is_read(tmp_path):
  tiny_models.make_llava(tmp_path / "in")
  text = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
  (tmp_path / "in" / "chat_template.json").write_text(json.dumps({"chat_template": text}))
  assert parity.open_model(tmp_path / "in")[0].tokenizer.chat_template == text
  (tmp_path / "in" / "chat_template.json").write_text("{}")
  with pytest.raises(InputError, match="chat_template is not a text"):
    parity.open_model(tmp_path / "in")
