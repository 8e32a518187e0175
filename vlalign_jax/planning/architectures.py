"""Published sizes of models, to plan a run before its weights are there."""

from vlalign_jax.errors import InputError
from vlalign_jax.models.clip import VisionConfig
from vlalign_jax.models.llama import LanguageConfig
from vlalign_jax.models.projector import ProjectorConfig
from vlalign_jax.models.rope import RopeConfig
from vlalign_jax.models.vlm import ModelConfig

# openai/clip-vit-large-patch14-336: 24 layers, of which LLaVA uses the features of the 23rd.
CLIP_L_336 = VisionConfig(
  width=1024,
  mlp_width=4096,
  layers=23,
  heads=16,
  image_size=336,
  patch_size=14,
  activation="quick_gelu",
  norm_epsilon=1e-5,
  feature_layers=(23,),
  keep_class_token=False,
)


def _llama(width, mlp_width, layers, heads, kv_heads, vocab_size, rope=RopeConfig()):  # noqa: B008
  return LanguageConfig(
    vocab_size=vocab_size,
    width=width,
    mlp_width=mlp_width,
    layers=layers,
    heads=heads,
    kv_heads=kv_heads,
    head_dim=128,
    norm_epsilon=1e-5,
    rope=rope,
  )


_LLAMA_3 = RopeConfig(theta=500_000.0)
# Vocabularies include <image> and a pad token, up to a multiple of 64.
LANGUAGE = {
  "llava15_7b": _llama(4096, 11008, 32, 32, 32, 32064),  # llava-hf/llava-1.5-7b-hf
  "llava15_13b": _llama(5120, 13824, 40, 40, 40, 32064),  # llava-hf/llava-1.5-13b-hf
  "llama3_8b": _llama(4096, 14336, 32, 32, 8, 128320, _LLAMA_3),  # meta-llama/Meta-Llama-3-8B
  "llama3_70b": _llama(8192, 28672, 80, 64, 8, 128320, _LLAMA_3),  # meta-llama/Meta-Llama-3-70B
}


def published(name: str) -> ModelConfig:
  """CLIP-L/336, an MLP projector and a language model of published size.

  Raises:
    InputError: no such model is known.
  """
  if name not in LANGUAGE:
    raise InputError(f"config.model.architecture is {name!r}; choose from {', '.join(LANGUAGE)}")
  language = LANGUAGE[name]
  return ModelConfig(
    vision=CLIP_L_336,
    projector=ProjectorConfig("mlp", CLIP_L_336.feature_width, language.width),
    language=language,
    image_token_id=language.vocab_size - 1,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
  )
