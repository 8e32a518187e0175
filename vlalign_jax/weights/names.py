"""Maps Hugging Face tensors to parameters; import and export both read this table."""

import re

import numpy as np

from vlalign_jax.models.vlm import SCORE, ModelConfig
from vlalign_jax.weights import families, towers, vision_names
from vlalign_jax.weights.vision_names import Name


def _projector(config: ModelConfig) -> list[Name]:
  newline = [Name("projector/newline", "projector.newline")] if config.projector.newline else []
  return newline + _projector_maps(config)


def _projector_maps(config: ModelConfig) -> list[Name]:
  kind, use_bias = config.projector.kind, config.projector.use_bias
  last = [
    *vision_names.linear("projector/linear", "projector.linear", use_bias or kind == "perceiver"),
    *vision_names.layer_norm("projector/norm", "projector.norm"),
  ]
  if kind == "linear":
    return last
  if kind == "vit":
    return vision_names.layer("projector/block", "projector.block") + last
  if kind == "perceiver":
    return [
      Name("projector/queries", "projector.queries"),
      *vision_names.layer_norm("projector/query_norm", "projector.query_norm"),
      *vision_names.linear("projector/input", "projector.input", True),
      *vision_names.layer_norm("projector/input_norm", "projector.input_norm"),
      *vision_names.attention("projector/attention", "projector.attention"),
      *last,
    ]
  if kind == "joined_linear":
    return vision_names.linear("projector/linear", "projector.proj", use_bias)
  norm = vision_names.layer_norm("projector/norm", "projector.layer_norm")
  return [
    *(norm if kind == "norm_mlp" else ()),
    *vision_names.linear("projector/first", "projector.linear_1", use_bias),
    *vision_names.linear("projector/second", "projector.linear_2", use_bias),
  ]


def _language(config: ModelConfig) -> list[Name]:
  language = config.language
  ours, theirs = "language/layers", "language.layers.{}"
  names = [Name("language/embedding/embedding", "language.embed_tokens.weight", "vocabulary")]
  for part, tensor in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
    use_bias = language.attention_bias or (language.qkv_bias and part != "out")
    names += vision_names.linear(
      f"{ours}/attention/{part}", f"{theirs}.self_attn.{tensor}_proj", use_bias
    )
  if language.query_key_norm:
    for part, tensor in (("query", "q"), ("key", "k")):
      names.append(
        Name(f"{ours}/attention/{part}_norm/scale", f"{theirs}.self_attn.{tensor}_norm.weight")
      )
  for part in ("gate", "up", "down"):
    names += vision_names.linear(
      f"{ours}/mlp/{part}", f"{theirs}.mlp.{part}_proj", language.mlp_bias
    )
  names += [
    Name(f"{ours}/attention_norm/scale", f"{theirs}.input_layernorm.weight"),
    Name(f"{ours}/mlp_norm/scale", f"{theirs}.post_attention_layernorm.weight"),
    Name("language/norm/scale", "language.norm.weight"),
  ]
  if config.head == SCORE:
    names.append(Name("score/kernel", "score.weight", "transposed"))
  elif not language.tied_embeddings:
    names.append(Name("language/head/kernel", "language.lm_head.weight", "vocabulary_transposed"))
  return names


def names_of(config: ModelConfig) -> list[Name]:
  """Returns the names of all parameters of the model."""
  vision = towers.of(config.vision).names(config.vision)
  return vision + _projector(config) + _language(config)


def layers_of(name: Name, config: ModelConfig) -> range:
  """Returns the layer numbers to put into a tensor's name; one if it is not stacked."""
  return range(getattr(config, name.path.split("/", 1)[0]).layers if name.stacked else 1)


_CANONICAL = (
  (r"^(model\.)?image_newline$", "projector.newline"),
  # Idefics3 and SmolVLM.
  (r"^model\.vision_model\.", "vision."),
  (r"^model\.connector\.modality_projection\.", "projector."),
  (r"^model\.text_model\.", "language."),
  # LLaVA's original repository.
  (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "vision."),
  (r"^model\.mm_projector\.0\.", "projector.linear_1."),
  (r"^model\.mm_projector\.2\.", "projector.linear_2."),
  # Newer versions of transformers put everything but the head under `model.`.
  (r"^model\.(vision_tower|multi_modal_projector|language_model)\.", r"\1."),
  (r"^vision_tower\.(vision_model\.)?", "vision."),
  (r"^multi_modal_projector\.", "projector."),
  (r"^language_model\.(model\.)?", "language."),
  # The directory of a vision tower, or of a model with a text tower; of a language model, with a
  # head or without.
  (r"^(vision_model\.)?(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.", r"vision.\2."),
  (r"^(model\.)?(layers|embed_tokens|norm)\.", r"language.\2."),
  (r"^lm_head\.", "language.lm_head."),
)

_NOT_OURS = re.compile(
  # The rest of a full CLIP or SigLIP.
  r"^(text_model|text_projection|visual_projection|logit_scale|logit_bias)\b"
  r"|\.position_ids$|\.rotary_emb\.inv_freq$"  # buffers in old files
  r"|^vision\.post_layernorm\."  # comes after the features
)


def canonical(tensor: str) -> str:
  """Returns a tensor's canonical name, whichever layout and transformers version wrote it."""
  for pattern, replacement in _CANONICAL:
    tensor, found = re.subn(pattern, replacement, tensor)
    if found and not tensor.startswith(("vision_tower", "multi_modal", "language_model")):
      break
  return tensor


def is_unused(tensor: str, config: ModelConfig) -> bool:
  """Returns whether the model may leave out the tensor of this canonical name."""
  if _NOT_OURS.search(tensor):
    return True
  if tensor.startswith("vision.head."):
    return towers.of(config.vision).head is not None
  layer = re.match(r"^vision\.encoder\.layers?\.(\d+)\.", tensor)
  if layer:
    return int(layer.group(1)) >= config.vision.layers
  headless = config.language.tied_embeddings or config.head == SCORE
  return tensor == "language.lm_head.weight" and headless


def exported(tensor: str, config: ModelConfig) -> str:
  """Returns the name that the model's class in transformers reads, in any version that has it.

  That class lacks a score head, which is named as in transformers' sequence classifiers.
  """
  return replace_prefix(tensor, *families.of(config).stored)


def exported_part(tensor: str, config: ModelConfig | None = None) -> str:
  """Returns the name in the directory of its part, which is a separate model (`weights.export`)."""
  return replace_prefix(
    tensor,
    ("vision.", "vision_model."),
    ("projector.newline", "image_newline"),
    ("projector.", "multi_modal_projector."),
    ("language.lm_head.", "lm_head."),
    ("language.", "model."),
  )


def replace_prefix(tensor: str, *prefixes: tuple[str, str]) -> str:
  """Replaces the first of the (old, new) prefixes that a name starts with."""
  for old, new in prefixes:
    if tensor.startswith(old):
      return new + tensor.removeprefix(old)
  return tensor


_LEADING = {"leading": 1, "two_leading": 2}  # kind -> axes of length 1


def to_param(kind: str, tensor: np.ndarray) -> np.ndarray:
  """Converts a tensor to the parameter of one layer, as a view where possible.

  Kinds: `same`; `transposed` and `vocabulary_transposed`: [out, in] to [in, out];
  `vocabulary`: [V, D] stays; `patches`: a convolution's [D, 3, p, p] to [p * p * 3, D];
  `leading` and `two_leading`: without one or two first axes of length 1.
  """
  if kind in _LEADING:
    return tensor.reshape(tensor.shape[_LEADING[kind] :])
  if kind in ("transposed", "vocabulary_transposed"):
    return tensor.T
  if kind == "patches":
    return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
  return tensor


def to_tensor(kind: str, param: np.ndarray) -> np.ndarray:
  """Converts a parameter of one layer to its tensor: the inverse of `to_param`."""
  if kind in _LEADING:
    return param.reshape((1,) * _LEADING[kind] + param.shape)
  if kind in ("transposed", "vocabulary_transposed"):
    return param.T
  if kind == "patches":
    side = int((param.shape[0] // 3) ** 0.5)
    return param.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)
  return param


def tensor_shape(kind: str, param_shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the tensor's shape for the shape of one layer's parameter."""
  return to_tensor(kind, np.broadcast_to(np.int8(0), param_shape)).shape
