"""Models of LLaVA-1.5 7B's widths with random parameters, and rows for them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vlalign_jax import trees
from vlalign_jax.data import rows as layouts
from vlalign_jax.data.encode import Example
from vlalign_jax.models import clip, llama, lora, projector, rope, vlm
from vlalign_jax.optim import optimizer
from vlalign_jax.planning import architectures
from vlalign_jax.sharding import hosts

TINY = vlm.ModelConfig(
  vision=clip.VisionConfig(64, 128, 2, 2, 28, 7, "quick_gelu", 1e-5, (2,), False),
  projector=projector.ProjectorConfig("mlp", 64, 128),
  language=llama.LanguageConfig(512, 128, 256, 4, 2, 2, 64, 1e-5, rope.RopeConfig()),
  image_token_id=511,
  image_mean=(0.5,) * 3,
  image_std=(0.25,) * 3,
)


def architecture(config, tiny: bool, layers: int | None = None) -> vlm.ModelConfig:
  """Returns the ModelConfig that a run's config names, or TINY, with so many decoder layers."""
  model = TINY if tiny else architectures.published(config.model)
  if layers:
    model = dataclasses.replace(model, language=dataclasses.replace(model.language, layers=layers))
  return dataclasses.replace(model, lora=lora.from_group(config.lora))


def decoder_sizes(model: vlm.ModelConfig) -> tuple[int, int]:
  """Returns the parameters of a decoder layer and those of the output head."""
  language = model.language
  attention = 2 * language.width * language.head_dim * (language.heads + language.kv_heads)
  return attention + 3 * language.width * language.mlp_width, language.width * language.vocab_size


def random_params(shapes):
  """Returns parameters drawn on the device: matrices with deviation 0.02, scales of 1.

  Args:
    shapes: nested dict of jax.ShapeDtypeStruct with shardings.
  """

  def draw(key, path, leaf):
    name = path.rsplit("/", 1)[-1]
    if name == "scale":
      return jnp.ones(leaf.shape, leaf.dtype)
    if name in ("bias", "lora_b"):
      return jnp.zeros(leaf.shape, leaf.dtype)
    return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

  flat = trees.flatten(shapes)

  def make(key):
    keys = jax.random.split(key, len(flat))
    drawn = (draw(k, *item) for k, item in zip(keys, flat.items(), strict=True))
    return trees.unflatten(dict(zip(flat, drawn, strict=True)))

  places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
  return jax.jit(make, out_shardings=places)(jax.random.key(0, impl="rbg"))


def initial(program, config):
  """Returns (state, frozen parameters) of a program with random parameters."""
  params = random_params(program.params)
  params, frozen = trees.split(params, functools.partial(optimizer.is_trained, config=config))
  if "reference" in program.frozen:
    frozen["reference"] = copied(params, program.frozen["reference"])
  return program.init_state(params), frozen


def copied(params, shapes):
  """Returns copies of those of `params` that `shapes` holds, in its dtypes."""
  flat = trees.flatten(params)
  return trees.map_paths(
    lambda path, leaf: jnp.array(flat[path], dtype=leaf.dtype, copy=True), shapes
  )


def packed_rows(model, mesh, rows: int, length: int, examples: int):
  """Returns rows on the device: so many examples each, an image and text that is learnt."""
  rng = np.random.default_rng(0)
  size, image = model.vision.image_size, model.tokens_per_image
  each = length // examples
  assert each > image + 1, "an example holds an image and text"
  stacked = []
  for _ in range(rows):
    parts = []
    for number in range(examples):
      text = rng.integers(5, model.image_token_id, each - image)
      tokens = np.concatenate([np.full(image, model.image_token_id), text]).astype(np.int32)
      weights = (np.arange(each) >= image - 1) & (np.arange(each) < each - 1)
      parts.append(
        Example(
          tokens=tokens,
          positions=np.arange(each, dtype=np.int32),
          branches=np.zeros(each, np.int32),
          targets=np.where(weights, np.roll(tokens, -1), 0).astype(np.int32),
          weights=weights.astype(np.float32),
          images=(str(number),),
          where="drawn at random",
        )
      )
    stacked.append(layouts.build_row(parts, length, examples, model.image_token_id, image)[0])
  arrays = {name: np.stack([row[name] for row in stacked]) for name in stacked[0]}
  images = rng.integers(0, 256, (rows, examples, size, size, 3), np.uint8)
  return hosts.to_device(mesh, arrays | {"images": images})


def prompt_rows(rows: dict) -> dict:
  """Returns what of rows with one example each is given to the sampler."""
  names = ("tokens", "positions", "segments", "image_slots", "images")
  return {name: rows[name] for name in names}


def step_flops(model, rows: int, length: int, images: int, learnt: int, trained: bool) -> float:
  """Returns a step's operations by the plain formula, without what remat computes again.

  6 for each parameter and token (4 where the weights stay), the head's for learnt tokens; causal
  attention over whole rows, 6 B L T^2 W; and the frozen tower's forward pass.

  Args:
    model: the architecture.
    rows: B.
    length: T.
    images: of all rows.
    learnt: tokens that the head sees.
    trained: whether the decoder's weights are; else adapters are, which are not counted.
  """
  layer, head = decoder_sizes(model)
  language, vision = model.language, model.vision
  each = 6 if trained else 4
  decoder = each * (language.layers * layer * rows * length + head * learnt)
  attention = 6 * rows * language.layers * length**2 * language.heads * language.head_dim
  tokens = vision.patches + 1
  tower = vision.layers * (4 * vision.width**2 + 2 * vision.width * vision.mlp_width)
  tower = 2 * images * tokens * (tower + 2 * vision.layers * tokens * vision.width)
  return decoder + attention + tower
