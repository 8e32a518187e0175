"""Maps the tensors of vision towers to parameters: a table for each kind of tower.

Tensors have their canonical names, see `names.canonical`.
"""

import dataclasses

from vlalign_jax.models.vit import VisionConfig


@dataclasses.dataclass(frozen=True)
class Name:
  """Names a parameter and its tensor.

  Attributes:
    path: of the parameter, such as "language/layers/attention/query/kernel"; under ".../layers/" it
      is stacked over layers.
    tensor: the canonical name of its tensor, see `canonical`; "{}" stands for the layer.
    kind: how the tensor's axes become the parameter's, see `to_param`.
  """

  path: str
  tensor: str
  kind: str = "same"

  @property
  def stacked(self) -> bool:
    return "{}" in self.tensor


def linear(path: str, tensor: str, use_bias: bool) -> list[Name]:
  """Returns the kernel of a linear map and its bias, if it has one."""
  names = [Name(f"{path}/kernel", f"{tensor}.weight", "transposed")]
  return names + ([Name(f"{path}/bias", f"{tensor}.bias")] if use_bias else [])


def layer_norm(path: str, tensor: str) -> list[Name]:
  """Returns scale and bias of a LayerNorm."""
  return [Name(f"{path}/scale", f"{tensor}.weight"), Name(f"{path}/bias", f"{tensor}.bias")]


def patches(tensor: str) -> list[Name]:
  """Returns the convolution of patches with its bias."""
  return [
    Name("vision/patch_embedding/kernel", f"{tensor}.weight", "patches"),
    Name("vision/patch_embedding/bias", f"{tensor}.bias"),
  ]


def attention(ours: str, theirs: str) -> list[Name]:
  """Returns the attention of the vision tower and of projectors: CLIP's names, with biases."""
  names = []
  for part, tensor in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
    names += linear(f"{ours}/{part}", f"{theirs}.{tensor}_proj", True)
  return names


def layer(ours: str, theirs: str) -> list[Name]:
  """Returns a layer of the vision tower, or the one of a projector."""
  return [
    *attention(f"{ours}/attention", f"{theirs}.self_attn"),
    *linear(f"{ours}/mlp/up", f"{theirs}.mlp.fc1", True),
    *linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2", True),
    *layer_norm(f"{ours}/attention_norm", f"{theirs}.layer_norm1"),
    *layer_norm(f"{ours}/mlp_norm", f"{theirs}.layer_norm2"),
  ]


def clip(config: VisionConfig) -> list[Name]:
  """Returns the names of CLIP's parameters."""
  return [
    Name("vision/class_embedding", "vision.embeddings.class_embedding"),
    Name("vision/position_embedding", "vision.embeddings.position_embedding.weight"),
    Name("vision/patch_embedding/kernel", "vision.embeddings.patch_embedding.weight", "patches"),
    *layer_norm("vision/input_norm", "vision.pre_layrnorm"),
    *_layers(config),
  ]


def siglip(config: VisionConfig) -> list[Name]:
  """Returns the names of SigLIP's parameters."""
  return [
    Name("vision/position_embedding", "vision.embeddings.position_embedding.weight"),
    *patches("vision.embeddings.patch_embedding"),
    *_layers(config),
    *(layer_norm("vision/output_norm", "vision.post_layernorm") if config.output_norm else ()),
  ]


def internvl(config: VisionConfig) -> list[Name]:
  """Returns the names of InternViT's parameters."""
  ours, theirs = "vision/layers", "vision.encoder.layer.{}"
  names = [
    Name("vision/class_embedding", "vision.embeddings.cls_token", "two_leading"),
    Name("vision/position_embedding", "vision.embeddings.position_embeddings", "leading"),
    *patches("vision.embeddings.patch_embeddings.projection"),
  ]
  for part, name in (("q", "query"), ("k", "key"), ("v", "value")):
    path = f"{ours}/attention/{name}"
    names += linear(path, f"{theirs}.attention.{part}_proj", config.qkv_bias)
    if config.query_key_norm and part != "v":
      names.append(Name(f"{path}_norm/scale", f"{theirs}.attention.{part}_norm.weight"))
  names += [
    *linear(f"{ours}/attention/out", f"{theirs}.attention.projection_layer", True),
    *linear(f"{ours}/mlp/up", f"{theirs}.mlp.fc1", True),
    *linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2", True),
    Name(f"{ours}/attention_scale/scale", f"{theirs}.lambda_1"),
    Name(f"{ours}/mlp_scale/scale", f"{theirs}.lambda_2"),
  ]
  for path, tensor in (("attention_norm", "layernorm_before"), ("mlp_norm", "layernorm_after")):
    both = layer_norm(f"{ours}/{path}", f"{theirs}.{tensor}")
    names += both[:1] if config.rms_norm else both
  return names


def siglip_head(config: VisionConfig) -> dict[str, tuple[int, ...]]:
  """Returns name -> shape of the tensors of SigLIP's pooling head."""
  width, mlp_width = config.width, config.mlp_width
  shapes = {
    "probe": (1, 1, width),
    "attention.in_proj_weight": (3 * width, width),
    "attention.in_proj_bias": (3 * width,),
    "attention.out_proj.weight": (width, width),
    "attention.out_proj.bias": (width,),
    "layernorm.weight": (width,),
    "layernorm.bias": (width,),
    "mlp.fc1.weight": (mlp_width, width),
    "mlp.fc1.bias": (mlp_width,),
    "mlp.fc2.weight": (width, mlp_width),
    "mlp.fc2.bias": (width,),
  }
  return {f"vision.head.{name}": shape for name, shape in shapes.items()}


def _layers(config: VisionConfig) -> list[Name]:
  return layer("vision/layers", "vision.encoder.layers.{}") if config.layers else []
