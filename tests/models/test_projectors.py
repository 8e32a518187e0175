"""The `vit` and `perceiver` projectors against their definitions in float64.

The definitions are written with operators that NumPy and torch share: NumPy gives the values, torch
the gradients.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tests.parity import relative_error
from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.models import clip, perceiver, projector

WIDTH = 256  # of the language model: two heads of the perceiver


def make_vision(image_size: int, keep_class_token: bool = False) -> clip.VisionConfig:
  return clip.VisionConfig(
    width=24,
    mlp_width=40,
    layers=2,
    heads=2,
    image_size=image_size,
    patch_size=4,
    activation="quick_gelu",
    norm_epsilon=1e-3,
    feature_layers=(1,),
    keep_class_token=keep_class_token,
  )


def layer_norm(x, params, epsilon):
  centered = x - x.mean(-1)[..., None]
  variance = (centered**2).mean(-1)[..., None]
  return centered / (variance + epsilon) ** 0.5 * params["scale"] + params["bias"]


def linear(x, params):
  return x @ params["kernel"] + params["bias"]


def attention(params, queries, keys, values, heads):
  """Computes multi-head attention of queries that see all keys, head by head."""
  query, key, value = (
    linear(x, params[name]) for x, name in ((queries, "query"), (keys, "key"), (values, "value"))
  )
  size, attended = query.shape[-1] // heads, 0
  for head in range(heads):
    channels = slice(head * size, (head + 1) * size)
    weights = np.e ** (query[..., channels] @ key[..., channels].swapaxes(-1, -2) / size**0.5)
    weights = weights / weights.sum(-1)[..., None]
    attended = attended + weights @ value[..., channels] @ params["out"]["kernel"][channels]
  return attended + params["out"]["bias"]


def vit(params, x, vision):
  """Computes CLIP's layer (Radford et al. 2021), then a linear map and a norm."""
  block = params["block"]
  normed = layer_norm(x, block["attention_norm"], vision.norm_epsilon)
  x = x + attention(block["attention"], normed, normed, normed, vision.heads)
  hidden = linear(layer_norm(x, block["mlp_norm"], vision.norm_epsilon), block["mlp"]["up"])
  hidden = hidden / (1 + np.e ** (-1.702 * hidden))
  x = x + linear(hidden, block["mlp"]["down"])
  return layer_norm(linear(x, params["linear"]), params["norm"], 1e-12)


def sines_and_cosines(width: int) -> np.ndarray:
  """Returns float64[16 * 16, width]: of the column, then of the row, sines before cosines."""
  table = np.zeros((16, 16, width))
  for row, column, i in np.ndindex(16, 16, width // 4):
    frequency = 10000 ** (-i / (width / 4))
    for part, place in enumerate((column, row)):
      table[row, column, part * width // 2 + i] = np.sin(place * frequency)
      table[row, column, part * width // 2 + width // 4 + i] = np.cos(place * frequency)
  return table.reshape(256, width)


def resized(table: np.ndarray, side: int) -> np.ndarray:
  """Resizes positions with torch's bicubic interpolation."""
  grid = torch.tensor(table).reshape(1, 16, 16, -1).permute(0, 3, 1, 2)
  grid = torch.nn.functional.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
  return grid.permute(0, 2, 3, 1).reshape(side * side, -1).numpy()


def reads_patches(params, x, vision):
  """Computes the perceiver: positions are added to queries and keys, not to values."""
  if vision.keep_class_token:
    x = x[:, 1:]
  table = sines_and_cosines(WIDTH)
  places = [table, resized(table, vision.image_size // vision.patch_size)]
  if isinstance(x, torch.Tensor):
    places = [torch.tensor(place) for place in places]
  values = layer_norm(linear(x, params["input"]), params["input_norm"], 1e-12)
  queries = layer_norm(params["queries"], params["query_norm"], 1e-12) + places[0]
  attended = attention(params["attention"], queries, values + places[1], values, WIDTH // 128)
  return linear(layer_norm(attended, params["norm"], 1e-12), params["linear"])


DEFINITIONS = {"vit": vit, "perceiver": reads_patches}


def make_module(kind: str, vision, **types):
  """Returns (graphdef, random parameters, with biases and scales unlike their initial values)."""
  config = projector.ProjectorConfig(kind, vision.feature_width, WIDTH)
  types = {"dtype": jnp.float32, "param_dtype": jnp.float32} | types
  module = projector.build_projector(config, vision, **types, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(module)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    if leaf.ndim > 1:
      return noise * leaf.shape[0] ** -0.5
    return 0.3 * noise + path.endswith("scale")

  return graphdef, trees.map_paths(draw, nnx.to_pure_dict(state))


@pytest.mark.parametrize(
  ("kind", "image_size", "keep_class_token"),
  [("vit", 12, False), ("vit", 8, True), ("perceiver", 20, False), ("perceiver", 12, True)],
)
def test_values_and_gradients_equal_the_definition(kind, image_size, keep_class_token):
  vision = make_vision(image_size, keep_class_token)
  graphdef, params = make_module(kind, vision)
  rng = np.random.default_rng(1)
  features = rng.normal(size=(2, vision.tokens_per_image, 24)).astype(np.float32)

  def call(params, features):
    return nnx.merge(graphdef, params)(features)

  @jax.jit
  def compute(params, features, cotangent):
    out, pull = jax.vjp(call, params, features)
    return out, pull(cotangent)

  exact = jax.tree.map(lambda x: x.astype(np.float64), (params, features))
  expected = DEFINITIONS[kind](*exact, vision)
  config = projector.ProjectorConfig(kind, 24, WIDTH)
  assert expected.shape == (2, projector.tokens_per_image(config, vision), WIDTH)
  cotangent = rng.normal(size=expected.shape).astype(np.float32)
  computed, grads = compute(params, features, cotangent)
  assert relative_error(computed, expected) < 1e-6

  tensors = jax.tree.map(lambda x: torch.tensor(x, requires_grad=True), exact)
  DEFINITIONS[kind](*tensors, vision).backward(torch.tensor(cotangent, dtype=torch.float64))
  for path, grad in trees.flatten({"params": grads[0], "features": grads[1]}).items():
    theirs = trees.flatten({"params": tensors[0], "features": tensors[1]})[path].grad
    if path.endswith("attention/key/bias"):  # adds the same to all scores of a query
      assert np.abs(grad).max() < 1e-4
    else:
      assert relative_error(grad, theirs) < 2e-6, path


@pytest.mark.parametrize("side", [3, 16, 24])
def test_positions_are_resized_as_torch_does(side):
  expected = resized(sines_and_cosines(WIDTH), side)
  assert relative_error(perceiver.positions(WIDTH, side), expected) < 1e-6


def test_what_does_not_fit_is_refused():
  vision = make_vision(12)
  odd = projector.ProjectorConfig("perceiver", 24, 192)
  with pytest.raises(InputError, match="here: .*heads of 128.*width 192 is not a multiple"):
    projector.check(odd, vision, "here")
  several = clip.VisionConfig(**{**vars(vision), "feature_layers": (0, 1)})
  with pytest.raises(InputError, match="here: the vit projector .* names 2: give one"):
    projector.check(projector.ProjectorConfig("vit", 48, 192), several, "here")
  with pytest.raises(InputError, match="projector 'q-former'; choose from linear, mlp, vit"):
    projector.check(projector.ProjectorConfig("q-former", 24, 192), vision, "here")
