"""What tests compare: our model opened from a directory, and transformers' torch model on examples.

The torch side never sees rows: it gets one example at a time, its images as float pixels, and a
plain causal mask.
"""

import jax
import numpy as np
import torch
from flax import nnx
from ml_collections import ConfigDict

from vlalign_jax import trees
from vlalign_jax.data.encode import Example
from vlalign_jax.data.rows import build_row
from vlalign_jax.models import vlm
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.stages import defaults
from vlalign_jax.weights import load, names, source

torch.set_num_threads(1)  # its idle threads would spin beside JAX's


def relative_error(found, expected) -> float:
  """Norm of the difference over the norm of what is expected."""
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  assert found.shape == expected.shape
  return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def model_group(**keys) -> ConfigDict:
  """The `model` group of a config."""
  model = defaults("sft").model
  model.update(keys)
  return model


def load_all(opened: source.ModelSource, seed: int = 0, **options):
  """(graphdef, params on one device) of a source; options as for `vlm.abstract_params`."""
  graphdef, abstract = vlm.abstract_params(opened.config, **options)
  place = meshes.replicated(meshes.make_mesh(defaults("sft").mesh, jax.devices()[:1]))
  abstract = meshes.place(abstract, jax.tree.map(lambda _: place, abstract))
  return graphdef, load.load_params(opened, abstract, seed)


def open_model(directory: str, **options):
  """(source, graphdef, params) of a model directory."""
  opened = source.open_source(model_group(init_from=str(directory)))
  return opened, *load_all(opened, **options)


def logits(graphdef, params, rows) -> np.ndarray:
  """float32[B, T, V] of our model."""
  call = jax.jit(lambda params, rows: vlm.logits(nnx.merge(graphdef, params), rows))
  return np.asarray(call(params, rows))


def make_pictures(number: int, size: int, seed: int = 0) -> dict[str, np.ndarray]:
  """Path -> uint8[size, size, 3] of noise."""
  rng = np.random.default_rng(seed)
  return {f"{n}.png": rng.integers(0, 256, (size, size, 3), np.uint8) for n in range(number)}


def make_example(
  config: vlm.ModelConfig, length: int, images: tuple[str, ...] = (), seed: int = 0
) -> Example:
  """Random text of `length` tokens with images between, of which about half is learned."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, config.image_token_id, length)  # <image> is the last token
  places = np.sort(rng.choice(length, len(images), replace=False))
  tokens = np.insert(tokens, places, config.image_token_id)
  counts = np.where(tokens == config.image_token_id, config.tokens_per_image, 1)
  tokens = np.repeat(tokens, counts).astype(np.int32)
  following = np.append(tokens[1:], config.image_token_id)
  weights = (following != config.image_token_id) & (rng.random(len(tokens)) < 0.6)
  return Example(
    tokens=tokens,
    positions=np.arange(len(tokens), dtype=np.int32),
    branches=np.zeros(len(tokens), np.int32),
    targets=np.where(weights, following, 0).astype(np.int32),
    loss_mask=weights.astype(np.float32),
    images=images,
    where="drawn at random",
  )


def make_rows(config: vlm.ModelConfig, layout, pictures, length: int, num_images: int):
  """A batch; `layout` lists the examples of each row."""
  size = config.vision.image_size
  images = np.zeros((len(layout), num_images, size, size, 3), np.uint8)
  arrays = []
  for b, examples in enumerate(layout):
    row, paths = build_row(
      examples, length, num_images, config.image_token_id, config.tokens_per_image
    )
    arrays.append(row)
    for i, path in enumerate(paths):
      images[b, i] = pictures[path]
  return {name: np.stack([row[name] for row in arrays]) for name in arrays[0]} | {"images": images}


def pixel_values(config: vlm.ModelConfig, pictures) -> torch.Tensor:
  """float32[N, 3, H, W] of uint8[H, W, 3] pictures, computed in float64."""
  pixels = np.stack(pictures) * config.rescale_factor
  pixels = (pixels - np.array(config.image_mean)) / np.array(config.image_std)
  return torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)


def torch_logits(model, config: vlm.ModelConfig, example: Example, pictures) -> torch.Tensor:
  """float32[N, V] of one example."""
  shown = [pictures[path] for path in example.images]
  pixels = pixel_values(config, shown) if shown else None
  return model(input_ids=torch.tensor(example.tokens)[None].long(), pixel_values=pixels).logits[0]


def torch_loss(model, config: vlm.ModelConfig, examples, pictures):
  """(mean cross-entropy over the learned tokens of all examples, their number)."""
  total, count = 0.0, 0
  for example in examples:
    losses = torch.nn.functional.cross_entropy(
      torch_logits(model, config, example, pictures),
      torch.tensor(example.targets).long(),
      reduction="none",
    )
    total = total + (losses * torch.tensor(example.loss_mask)).sum()
    count += int(example.loss_mask.sum())
  return total / count, count


def torch_name(tensor: str, family: str = "llava") -> str:
  """The name in transformers 5's state dict, from the canonical one of `names`."""
  for canonical, name in TORCH_NAMES.get(family, LLAVA_NAMES):
    if tensor.startswith(canonical):
      return name + tensor[len(canonical) :]
  raise ValueError(tensor)


LLAVA_NAMES = (
  ("vision.", "model.vision_tower."),
  ("projector.newline", "model.image_newline"),
  ("projector.", "model.multi_modal_projector."),
  ("language.lm_head.", "lm_head."),
  ("language.", "model.language_model."),
)
IDEFICS3_NAMES = (
  ("vision.", "model.vision_model."),
  ("projector.", "model.connector.modality_projection."),
  ("language.lm_head.", "lm_head."),
  ("language.", "model.text_model."),
)
# Family -> (start of a canonical name, start of the name in torch); default: LLAVA_NAMES.
TORCH_NAMES = {"idefics3": IDEFICS3_NAMES, "smolvlm": IDEFICS3_NAMES}


def as_params(config: vlm.ModelConfig, tensors) -> dict[str, np.ndarray]:
  """Path -> array of our tree, from torch tensors (weights or gradients) by torch name."""
  shapes = trees.flatten(vlm.abstract_params(config)[1])
  params = {}
  for name in names.names_of(config):
    layers = range(shapes[name.path].shape[0]) if name.stacked else (None,)
    stored = [tensors[torch_name(name.tensor.format(layer), config.family)] for layer in layers]
    found = [names.to_param(name.kind, tensor.detach().numpy()) for tensor in stored]
    params[name.path] = np.stack(found) if name.stacked else found[0]
  assert params.keys() == shapes.keys()
  return params
