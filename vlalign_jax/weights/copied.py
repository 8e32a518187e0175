"""Copies the parameters that were not trained, or are never run, from the source's files.

LLaVA takes its features from a layer of the vision tower. The later layers, post_layernorm and
a head that pools the patches are neither loaded nor run here; an export copies them unchanged.
"""

import dataclasses

import numpy as np

from vlalign_jax import trees
from vlalign_jax.models import vlm
from vlalign_jax.weights import load, names, shards, towers
from vlalign_jax.weights.parts import ModelSource
from vlalign_jax.weights.tensors import Tensor

POST_NORM = ("vision.post_layernorm.weight", "vision.post_layernorm.bias")


@dataclasses.dataclass(frozen=True)
class Tower:
  """Describes the vision tower of an export.

  Attributes:
    layers: its number of layers: as in the source, but if the source's files lack a layer after the
      last used one, the tower ends before it.
    feature_layer: `vision_feature_layer` of a tower with this number of layers; None if the model's
      config has no such key.
    unused: canonical name -> tensor of the layers that are not run, of post_layernorm and the head.
    head: whether it has the head that pools the last hidden state.
  """

  layers: int
  feature_layer: int | list[int] | None
  unused: dict[str, Tensor]
  head: bool

  @property
  def has_post_norm(self) -> bool:
    return self.unused.keys() >= set(POST_NORM)


def tower_of(source: ModelSource) -> Tower:
  """Returns the vision tower of the source's export; reads no weights."""
  config, hf = source.config, source.hf
  used, total = config.vision.layers, hf.vision_config.num_hidden_layers
  layer_shapes = _layer_shapes(config) if used < total else {}
  layers, unused = used, {}
  while layers < total:
    shapes = {name.format(layers): shape for name, shape in layer_shapes.items()}
    if not _holds(source, shapes):
      break
    unused |= {name: source.tensors[name] for name in shapes}
    layers += 1
  kind = towers.of(config.vision)
  if kind.has_post_norm and _holds(source, dict.fromkeys(POST_NORM, (config.vision.width,))):
    unused |= {name: source.tensors[name] for name in POST_NORM}
  head = towers.head_of(config.vision, hf.vision_config)
  if not _holds(source, head):
    head = {}
  unused |= {name: source.tensors[name] for name in head}
  feature_layer = getattr(hf, "vision_feature_layer", None)
  if layers < total:
    several = [layer - layers - 1 for layer in config.vision.feature_layers]
    feature_layer = several[0] if isinstance(feature_layer, int) else several
  return Tower(layers, feature_layer, unused, bool(head))


def _layer_shapes(config: vlm.ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns name -> shape of the tensors of a layer of the vision tower; "{}" is its number."""
  one = dataclasses.replace(config, vision=dataclasses.replace(config.vision, layers=1))
  one = dataclasses.replace(one, lora=None)
  shapes = trees.flatten(vlm.abstract_params(one)[1])
  return {
    name.tensor: names.tensor_shape(name.kind, shapes[name.path].shape[1:])
    for name in names.names_of(one)
    if name.path.startswith("vision/layers/")
  }


def _holds(source: ModelSource, shapes: dict[str, tuple[int, ...]]) -> bool:
  """Returns whether the source's files have tensors of all these names and shapes."""
  tensors = source.tensors
  return all(name in tensors and tensors[name].shape == shape for name, shape in shapes.items())


def untrained(source: ModelSource, paths: set[str], dtype: np.dtype | None):
  """Reads parameters from the source's files, one tensor at a time.

  Args:
    source: the model.
    paths: of the parameters.
    dtype: of the yielded tensors; None: as they are stored.

  Yields:
    (canonical name, tensor). A vocabulary that is smaller than the model's is extended as in
    `shards.place`.

  Raises:
    InputError: see `load.resolve`.
  """
  if not paths:
    return
  leaves = trees.flatten(vlm.abstract_params(source.config)[1])
  entries = load.resolve(source, {path: leaf.shape for path, leaf in leaves.items()})
  for path in sorted(paths):
    name = entries[path].name
    for layer, tensor in enumerate(entries[path].tensors):
      stored = shards.read_tensor(name, tensor, source.config.language.vocab_size)
      yield name.tensor.format(layer), as_stored(stored, dtype)


def as_stored(tensor: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
  """Returns the tensor, contiguous and in `dtype` (None: unchanged)."""
  return np.ascontiguousarray(tensor if dtype is None else tensor.astype(dtype, copy=False))
