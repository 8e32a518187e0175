"""Tests published sizes: numbers of parameters are those of the published models."""

import dataclasses

import pytest
import torch
import transformers
from transformers import LlavaConfig

from configs import sft
from tests.planning import small
from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.models import vlm
from vlalign_jax.stages import defaults
from vlalign_jax.weights import hf_config
from vlalign_jax.weights import published as sizes

# Parameters of the language models on the hub, plus the rows of <image> and padding.
LANGUAGE = {
  "llava15_7b": 6_738_415_616 + 2 * 64 * 4096,
  "llava15_13b": 13_015_864_320 + 2 * 64 * 5120,
  "llama3_8b": 8_030_261_248 + 2 * 64 * 4096,
  "llama3_70b": 70_553_706_496 + 2 * 64 * 8192,
  "qwen3_8b": 8_190_735_360,  # has rows to spare
}
# clip-vit-large-patch14-336's tower less its last layer and norm, which LLaVA does not use.
VISION = 303_507_456 - 12_596_224 - 2 * 1024


FULL = {"vision_feature_select_strategy": "full"}


def published(architecture: str, **keys):
  group = defaults("sft").model
  group.update(keys, architecture=architecture)
  return sizes.published(group)


@pytest.mark.parametrize("name", LANGUAGE)
def test_parameter_counts(name):
  config = published(name)
  _, params = vlm.abstract_params(config)
  width = config.language.width
  assert trees.size(params["language"]) == LANGUAGE[name]
  assert trees.size(params["vision"]) == VISION
  assert trees.size(params["projector"]) == 1025 * width + (width + 1) * width


def test_llava_equals_the_default_of_transformers():
  vision, projector, language = hf_config.parts_of(LlavaConfig(), "transformers")
  ours = published("llava15_7b")
  assert vision == ours.vision
  assert projector == ours.projector
  changed = {"vocab_size": 32064, "norm_epsilon": 1e-5, "rope": ours.language.rope}
  assert dataclasses.replace(language, **changed) == ours.language


TILED = {
  "llava_next_mistral_7b": ("mistral", 4096, 14336, 32, 32, 8, 32064, 1e6, 1e-5),
  "internvl3_1b": ("qwen2", 896, 4864, 24, 14, 2, 151674, 1e6, 1e-6),
  "internvl3_8b": ("qwen2", 3584, 18944, 28, 28, 4, 151674, 1e6, 1e-6),
  "internvl35_8b": ("qwen3", 4096, 12288, 36, 32, 8, 151936, 1e6, 1e-6),
}


@pytest.mark.parametrize("name", TILED)
def test_models_of_tiles_equal_those_of_transformers(name):
  kind, width, mlp_width, layers, heads, kv_heads, vocabulary, theta, epsilon = TILED[name]
  text = transformers.AutoConfig.for_model(
    kind,
    hidden_size=width,
    intermediate_size=mlp_width,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    num_key_value_heads=kv_heads,
    vocab_size=vocabulary,
    rope_parameters={"rope_type": "default", "rope_theta": theta},
    rms_norm_eps=epsilon,
    **({"sliding_window": None} if kind == "mistral" else {}),
  )
  if kind == "mistral":
    hf = transformers.LlavaNextConfig(text_config=text)
  else:
    vision = transformers.InternVLVisionConfig(attention_bias=True)
    hf = transformers.InternVLConfig(
      text_config=text, vision_config=vision, tie_word_embeddings=False
    )
  ours = published(name)
  vision, projector, language = hf_config.parts_of(hf, "transformers")
  rope = dataclasses.replace(language.rope, original_length=ours.language.rope.original_length)
  assert (vision, projector) == (ours.vision, ours.projector)
  assert dataclasses.replace(language, rope=rope) == ours.language
  with torch.device("meta"):
    model = transformers.AutoModelForImageTextToText.from_config(hf)
  unused = ("post_layernorm", "vision_tower.encoder.layers.23.")
  sizes_in_torch = {name: param.numel() for name, param in model.named_parameters()}
  used = sum(n for name, n in sizes_in_torch.items() if not any(part in name for part in unused))
  assert trees.size(vlm.abstract_params(ours)[1]) == used


SMALL = {  # parameters on the hub
  "smolvlm_256m": 256_484_928,
  "smolvlm_500m": 507_482_304,
  "smolvlm_2b": 2_246_272_880,
  "internvl3_1b": 938_193_024,
}


@pytest.mark.parametrize("name", SMALL)
def test_sizes_on_the_hub(name):
  assert trees.size(vlm.abstract_params(published(name))[1]) == SMALL[name]


def test_smolvlm_equals_that_of_transformers():
  text = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
  text |= {"num_attention_heads": 32, "head_dim": 64, "vocab_size": 49155, "model_type": "llama"}
  text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 130_000.0}}
  vision = {"intermediate_size": 4304, "num_hidden_layers": 27, "image_size": 384}
  vision |= {"patch_size": 14}
  for config in (transformers.Idefics3Config, transformers.SmolVLMConfig):
    hf = config(text_config=text | {"rms_norm_eps": 1e-5}, vision_config=vision, scale_factor=3)
    vision_config, projector, language = hf_config.parts_of(hf, "transformers")
    ours = published("smolvlm_2b")
    rope = dataclasses.replace(language.rope, original_length=ours.language.rope.original_length)
    assert dataclasses.asdict(vision_config) == dataclasses.asdict(ours.vision)
    assert projector == ours.projector
    assert dataclasses.replace(language, rope=rope) == ours.language


def test_lines_of_patches_that_transformers_rounds_are_refused():
  vision = {"image_size": 25 * 14, "patch_size": 14}
  hf = transformers.Idefics3Config(vision_config=vision)
  with pytest.raises(InputError, match="lines of 25 patches, of which transformers takes some"):
    hf_config.parts_of(hf, "transformers")


def test_parameters_of_siglip():
  config = published("siglip_so400m_384", **FULL, vision_feature_layer="-1")
  assert config.tokens_per_image == 729
  assert config.vision.width // config.vision.heads == 72
  sizes_in_torch = transformers.SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
    vision_use_head=False,
  )
  with torch.device("meta"):
    tower = transformers.SiglipVisionModel(sizes_in_torch)
  _, params = vlm.abstract_params(config)
  post_norm = 2 * 1152
  assert trees.size(params["vision"]) == tower.num_parameters() - post_norm
  converted = hf_config.vision_config(sizes_in_torch, -1, "full", "transformers")
  assert config.vision == converted
  with pytest.raises(InputError, match="no class token .*strategy=full"):
    published("siglip_so400m_384")


def test_unknown_name():
  with pytest.raises(InputError, match="'llava_7b'; choose from llava15_7b, llava15_13b"):
    published("llava_7b")


def test_a_model_follows_its_config():
  """Vision-LLM-Alignment's towers and projectors have its tokens, features and parameters."""
  preset = sft.get_config("clip_llama2_7b_pretrain")
  config = small.model_config(preset)
  assert (config.projector.kind, config.tokens_per_image) == ("linear", 257)
  assert (config.vision.layers, config.vision.image_size) == (24, 224)
  _, params = vlm.abstract_params(config)
  assert trees.size(params["projector"]) == 1025 * 4096 + 2 * 4096
  keys = {"vision_feature_select_strategy": "full", "projector": "perceiver", "mmca": True}
  config = published("clip_llama3_8b", **keys)
  assert (config.projector.kind, config.tokens_per_image, config.mmca) == ("perceiver", 256, True)
  several = published("llava15_7b", vision_feature_layer="-2,-5")
  assert (several.vision.feature_layers, several.projector.in_width) == ((23, 20), 2048)
  with pytest.raises(InputError, match="vision_feature_layer -30 of a tower with 24 layers"):
    published("llava15_7b", vision_feature_layer="-30")
  with pytest.raises(InputError, match="the vit projector .* names 2: give one"):
    published("llava15_7b", vision_feature_layer="-2,-5", projector="vit")
