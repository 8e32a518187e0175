"""Published sizes: parameters as the makers count them."""

import dataclasses

import pytest
from transformers import LlavaConfig

from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.models import vlm
from vlalign_jax.planning import architectures
from vlalign_jax.weights import hf_config

# Parameters of the language models as on the hub, without the rows that <image> and padding add.
LANGUAGE = {
  "llava15_7b": 6_738_415_616 + 2 * 64 * 4096,
  "llava15_13b": 13_015_864_320 + 2 * 64 * 5120,
  "llama3_8b": 8_030_261_248 + 2 * 64 * 4096,
  "llama3_70b": 70_553_706_496 + 2 * 64 * 8192,
}
# clip-vit-large-patch14-336's tower less its last layer and norm, which LLaVA does not use.
VISION = 303_507_456 - 12_596_224 - 2 * 1024


@pytest.mark.parametrize("name", architectures.LANGUAGE)
def test_parameter_counts(name):
  config = architectures.published(name)
  _, params = vlm.abstract_params(config)
  width = config.language.width
  assert trees.size(params["language"]) == LANGUAGE[name]
  assert trees.size(params["vision"]) == VISION
  assert trees.size(params["projector"]) == 1025 * width + (width + 1) * width


def test_llava_is_what_transformers_has_as_default():
  vision, projector, language = hf_config.parts_of(LlavaConfig(), "transformers")
  ours = architectures.published("llava15_7b")
  assert vision == ours.vision
  assert projector == ours.projector
  changed = {"vocab_size": 32064, "norm_epsilon": 1e-5, "rope": ours.language.rope}
  assert dataclasses.replace(language, **changed) == ours.language


def test_unknown_name():
  with pytest.raises(InputError, match="'llava_7b'; choose from llava15_7b, llava15_13b"):
    architectures.published("llava_7b")
