"""Lists published sizes of models, to plan a run before its weights are downloaded."""

import dataclasses

from vlalign_jax.data.image_processor import ImagePreprocessor
from vlalign_jax.errors import InputError
from vlalign_jax.models import clip, idefics3, internvl, siglip
from vlalign_jax.models import projector as projectors
from vlalign_jax.models.llama import LanguageConfig
from vlalign_jax.models.projector import ProjectorConfig
from vlalign_jax.models.rope import RopeConfig
from vlalign_jax.models.vit import VisionConfig
from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.weights import assemble, families, hf_config, towers

# openai/clip-vit-large-patch14-336 with all layers; a run's config says which features it uses.
CLIP_L_336 = clip.VisionConfig(
  width=1024,
  mlp_width=4096,
  layers=24,
  heads=16,
  image_size=336,
  patch_size=14,
  activation="quick_gelu",
  norm_epsilon=1e-5,
  feature_layers=(24,),
  keep_class_token=False,
)
CLIP_L_224 = dataclasses.replace(CLIP_L_336, image_size=224)  # openai/clip-vit-large-patch14

# google/siglip-so400m-patch14-384 and google/siglip2-so400m-patch14-384
SIGLIP_SO400M_384 = siglip.VisionConfig(
  width=1152,
  mlp_width=4304,
  layers=27,
  heads=16,
  image_size=384,
  patch_size=14,
  activation="gelu_pytorch_tanh",
  norm_epsilon=1e-6,
  feature_layers=(27,),
  keep_class_token=True,
)


# The tower of OpenGVLab/InternVL3-8B-hf and others
INTERNVIT_300M = internvl.VisionConfig(
  width=1024,
  mlp_width=4096,
  layers=24,
  heads=16,
  image_size=448,
  patch_size=14,
  activation="gelu",
  norm_epsilon=1e-6,
  feature_layers=(24,),
  keep_class_token=False,
  layer_scale=0.1,
)


# The tower of HuggingFaceTB/SmolVLM-256M-Instruct and SmolVLM-500M-Instruct
SMOLVLM_512 = idefics3.VisionConfig(
  width=768,
  mlp_width=3072,
  layers=12,
  heads=12,
  image_size=512,
  patch_size=16,
  activation="gelu_pytorch_tanh",
  norm_epsilon=1e-6,
  feature_layers=(12,),
  keep_class_token=True,
  output_norm=True,
)


def _idefics3_so400m(image_size: int) -> VisionConfig:
  fields = dataclasses.asdict(SIGLIP_SO400M_384) | {"image_size": image_size, "output_norm": True}
  return idefics3.VisionConfig(**fields)


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
_VICUNA_7B = _llama(4096, 11008, 32, 32, 32, 32064)
_LLAMA_3_8B = _llama(4096, 14336, 32, 32, 8, 128320, _LLAMA_3)  # meta-llama/Meta-Llama-3-8B
_QWEN3_8B = dataclasses.replace(  # Qwen/Qwen3-8B
  _llama(4096, 12288, 36, 32, 8, 151936, RopeConfig(theta=1e6)),
  norm_epsilon=1e-6,
  query_key_norm=True,
)
_VICUNA_13B = _llama(5120, 13824, 40, 40, 40, 32064)
_MISTRAL_7B = _llama(4096, 14336, 32, 32, 8, 32064, RopeConfig(theta=1e6))


@dataclasses.dataclass(frozen=True)
class Published:
  """The sizes of a model.

  Attributes:
    vision, language: its towers.
    family: one of `families`.
    most_tiles: of a picture.
    joined: see ProjectorConfig.
    strategy: of the features of a model whose projector, and whose last layer, are not a choice.
  """

  vision: VisionConfig
  language: LanguageConfig
  family: str = "llava"
  most_tiles: int = 1
  joined: int = 1
  strategy: str | None = None


def _llava_next(language: LanguageConfig) -> Published:
  return Published(CLIP_L_336, language, "llava_next", most_tiles=5)


def _internvl(language: LanguageConfig) -> Published:
  return Published(
    INTERNVIT_300M, language, "internvl", most_tiles=13, joined=2, strategy="default"
  )


def _qwen2(width, mlp_width, layers, heads, kv_heads, head_dim=128):
  """Returns a Qwen2.5 with the vocabulary of InternVL3."""
  language = _llama(width, mlp_width, layers, heads, kv_heads, 151674, RopeConfig(theta=1e6))
  return dataclasses.replace(language, head_dim=head_dim, norm_epsilon=1e-6, qkv_bias=True)


def _idefics3(vision: VisionConfig, language: LanguageConfig, joined: int) -> Published:
  options = {"most_tiles": 17, "joined": joined, "strategy": "full"}
  return Published(vision, language, "idefics3", **options)


def _smollm2(width, mlp_width, layers, heads, kv_heads, vocab_size, theta=1e5):
  sizes = width, mlp_width, layers, heads, kv_heads, vocab_size
  return dataclasses.replace(_llama(*sizes, RopeConfig(theta=theta)), head_dim=64)


MODELS = {
  "llava15_7b": Published(CLIP_L_336, _VICUNA_7B),  # llava-hf/llava-1.5-7b-hf
  "llava15_13b": Published(CLIP_L_336, _VICUNA_13B),  # llava-hf/llava-1.5-13b-hf
  "llama3_8b": Published(CLIP_L_336, _LLAMA_3_8B),
  # meta-llama/Meta-Llama-3-70B
  "llama3_70b": Published(CLIP_L_336, _llama(8192, 28672, 80, 64, 8, 128320, _LLAMA_3)),
  "qwen3_8b": Published(CLIP_L_336, _QWEN3_8B),
  "clip_llama2_7b": Published(CLIP_L_224, _VICUNA_7B),  # Vision-LLM-Alignment's towers
  "clip_llama3_8b": Published(CLIP_L_224, _LLAMA_3_8B),
  "siglip_so400m_384": Published(SIGLIP_SO400M_384, _LLAMA_3_8B),
  "llava_next_7b": _llava_next(_VICUNA_7B),  # llava-hf/llava-v1.6-vicuna-7b-hf
  "llava_next_13b": _llava_next(_VICUNA_13B),  # llava-hf/llava-v1.6-vicuna-13b-hf
  "llava_next_mistral_7b": _llava_next(_MISTRAL_7B),  # llava-hf/llava-v1.6-mistral-7b-hf
  "llava_next_llama3_8b": _llava_next(_LLAMA_3_8B),  # llava-hf/llama3-llava-next-8b-hf
  "internvl3_1b": _internvl(_qwen2(896, 4864, 24, 14, 2, 64)),  # OpenGVLab/InternVL3-1B-hf
  "internvl3_2b": _internvl(_qwen2(1536, 8960, 28, 12, 2)),  # OpenGVLab/InternVL3-2B-hf
  "internvl3_8b": _internvl(_qwen2(3584, 18944, 28, 28, 4)),  # OpenGVLab/InternVL3-8B-hf
  "internvl35_8b": _internvl(_QWEN3_8B),  # OpenGVLab/InternVL3_5-8B-HF
  # HuggingFaceTB/SmolVLM-256M-Instruct, -500M-Instruct and SmolVLM-Instruct; SmolVLM2 is the same
  "smolvlm_256m": _idefics3(SMOLVLM_512, _smollm2(576, 1536, 30, 9, 3, 49280), 4),
  "smolvlm_500m": _idefics3(SMOLVLM_512, _smollm2(960, 2560, 32, 15, 5, 49280), 4),
  "smolvlm_2b": _idefics3(
    _idefics3_so400m(384), _smollm2(2048, 8192, 24, 32, 32, 49155, 130_000.0), 3
  ),
  # HuggingFaceM4/Idefics3-8B-Llama3
  "idefics3_8b": _idefics3(
    _idefics3_so400m(364), dataclasses.replace(_LLAMA_3_8B, vocab_size=128259), 2
  ),
}


def published(group) -> ModelConfig:
  """Returns a model of published size with the projector and attention of a config.

  Args:
    group: the config's `model` group.

  Raises:
    InputError: the model is unknown, or the projector does not fit it.
  """
  name, where = group.architecture, "config.model"
  if name not in MODELS:
    raise InputError(f"config.model.architecture is {name!r}; choose from {', '.join(MODELS)}")
  sizes = MODELS[name]
  tower, language, family = sizes.vision, sizes.language, families.FAMILIES[sizes.family]
  layers = [-1] if sizes.strategy else assemble.feature_layers_of(group)
  strategy = sizes.strategy or group.vision_feature_select_strategy
  used = hf_config.feature_layers(layers, tower.layers, where)
  vision = dataclasses.replace(
    tower,
    layers=max(used),
    feature_layers=used,
    keep_class_token=hf_config.keeps_class_token(strategy, where),
  )
  towers.check_new(vision, where)
  kind = family.processor or towers.of(vision).processor
  images = ImagePreprocessor.from_config({}, kind=kind)
  projector = ProjectorConfig(
    family.own_projector if sizes.strategy else group.projector,
    vision.feature_width * sizes.joined**2,
    language.width,
    use_bias=family.own_projector != "joined_linear",
    newline=sizes.family == "llava_next",
    joined=sizes.joined,
  )
  projectors.check(projector, vision, where)
  return ModelConfig(
    vision=vision,
    projector=projector,
    language=language,
    image_token_id=language.vocab_size - 1,
    image_mean=images.mean,
    image_std=images.std,
    mmca=group.mmca,
    family=sizes.family,
    most_tiles=sizes.most_tiles,
  )
