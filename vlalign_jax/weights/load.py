"""Loads weights from files into sharded device arrays, one parameter at a time."""

import dataclasses
import math
from collections.abc import Callable

import jax

from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.models import lora, vlm
from vlalign_jax.runs import checkpoints
from vlalign_jax.weights import names, peft, runs, shards
from vlalign_jax.weights.parts import ModelSource
from vlalign_jax.weights.tensors import Tensor


@dataclasses.dataclass(frozen=True)
class Entry:
  """Holds a parameter's name and the tensors it is read from, one per layer if it is stacked."""

  name: names.Name
  tensors: tuple[Tensor, ...]


def resolve(source: ModelSource, shapes: dict[str, tuple[int, ...]]) -> dict[str, Entry]:
  """Finds the tensors of every parameter and checks that all names and shapes match.

  Args:
    source: from `open_source`.
    shapes: path -> shape, for all parameters of the model.

  Returns:
    path -> Entry for all parameters that are not fresh.

  Raises:
    InputError: lists all missing, unexpected and wrongly shaped tensors.
  """
  config, wrong, used, entries = source.config, [], set(), {}
  for name in names.names_of(config):
    if name.path.startswith(source.fresh):
      continue
    shape = shapes[name.path]
    expected = names.tensor_shape(name.kind, shape[1:] if name.stacked else shape)
    tensors = []
    for layer in range(shape[0]) if name.stacked else (0,):
      canonical = name.tensor.format(layer)
      used.add(canonical)
      tensor = source.tensors.get(canonical)
      if tensor is None:
        wrong.append(f"missing {canonical} {expected}")
        continue
      fits = tensor.shape == expected
      if source.assembled and name.kind.startswith("vocabulary"):
        fits = tensor.shape[1:] == expected[1:] and tensor.shape[0] <= expected[0]
      if not fits:
        wrong.append(f"{tensor.name} in {tensor.file} is {tensor.shape}, not {expected}")
      tensors.append(tensor)
    entries[name.path] = Entry(name, tuple(tensors))
  for canonical, tensor in source.tensors.items():
    if canonical not in used and not names.is_unused(canonical, config):
      wrong.append(f"unexpected {tensor.name} {tensor.shape} in {tensor.file}")
  if wrong:
    raise InputError(
      f"{len(wrong)} tensors do not fit the model that config.json describes:\n  "
      + "\n  ".join(wrong)
    )
  return entries


def check_weights(source: ModelSource) -> None:
  """Raises the InputErrors of `resolve` without reading weights."""
  _, abstract = vlm.abstract_params(source.config)
  resolve(source, {path: leaf.shape for path, leaf in trees.flatten(abstract).items()})


def load_params(
  source: ModelSource,
  abstract,
  seed: int = 0,
  wanted: Callable[[str], bool] = lambda path: True,
):
  """Loads the model's parameters onto the devices.

  Every host reads the shards of its devices, and holds one parameter at a time in host memory.

  Args:
    source: from `open_source`.
    abstract: nested dict of jax.ShapeDtypeStruct with shardings, from `vlm.abstract_params`.
    seed: of fresh parameters.
    wanted: path -> whether to load the parameter.

  Returns:
    Nested dict of jax.Array.
  """
  leaves = trees.flatten(abstract)
  placement = {path: leaf.sharding for path, leaf in leaves.items()}
  entries = resolve(source, {path: leaf.shape for path, leaf in leaves.items()})
  _check_tied(source)
  from_peft = start_entries(source)
  leaves = {path: leaf for path, leaf in leaves.items() if wanted(path)}
  loaded, merges = runs.restore(source, leaves, placement)
  if source.start and source.start.run:
    loaded |= checkpoints.restore_params(*source.start.run, leaves, placement)
  loaded = {path: param for path, param in loaded.items() if path not in from_peft}
  entries |= from_peft
  vocabulary = source.config.language.vocab_size
  # The largest tensors come first, while few parameters are loaded: this lowers the peak of memory.
  by_size = sorted(entries, key=lambda path: -math.prod(entries[path].tensors[0].shape))
  with shards.readers() as pool:
    for path in by_size:
      if path in leaves and path not in loaded:
        name, stored = entries[path].name, entries[path].tensors
        loaded[path] = shards.place(name, stored, leaves[path], placement[path], vocabulary, pool)
  for path, pairs in merges.items():
    for a, b, scale in pairs:
      loaded[path] = lora.merge(loaded[path], a, b, scale, placement[path])
  fresh = {path: leaf for path, leaf in leaves.items() if path not in loaded}
  if fresh:
    loaded |= _init(source.config, fresh, placement, seed)
  return trees.unflatten({path: loaded[path] for path in leaves})


def _check_tied(source: ModelSource) -> None:
  """Raises an InputError if a head is stored that differs from the embedding it is tied to.

  That head would be lost. Each process compares its part of the rows.
  """
  head = source.tensors.get("language.lm_head.weight")
  if head is None or not source.config.language.tied_embeddings or source.assembled:
    return
  embedding = source.tensors["language.embed_tokens.weight"]
  if head.shape != embedding.shape or not shards.equal(head, embedding):
    raise InputError(
      f"{head.file}: {head.name} differs from the embedding, but config.json says "
      "tie_word_embeddings; set it to false there to use both, or remove the tensor"
    )


def start_entries(source: ModelSource) -> dict[str, Entry]:
  """Returns path -> Entry of the parameters in the PEFT directory that a source starts from."""
  tensors = source.start.tensors if source.start else {}
  entries = {}
  if tensors:
    for name in [*peft.names_of(source.config), *names.names_of(source.config)]:
      if name.tensor.format(0) in tensors:
        layers = names.layers_of(name, source.config)
        entries[name.path] = Entry(name, tuple(tensors[name.tensor.format(i)] for i in layers))
  return entries


def _init(config: vlm.ModelConfig, leaves, placement, seed: int) -> dict[str, jax.Array]:
  """Initializes fresh parameters in float32 and casts them, so all dtypes start the same."""

  def init(key):
    params = trees.flatten(vlm.init_params(config, key)[1])
    return {path: params[path].astype(leaf.dtype) for path, leaf in leaves.items()}

  init = jax.jit(init, out_shardings={path: placement[path] for path in leaves})
  return init(jax.random.key(seed))
