"""Models of LLaVA-1.5 7B's widths with random parameters, and rows for them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vlalign_jax import trees
from vlalign_jax.models import clip, llama, lora, projector, rope, vlm
from vlalign_jax.optim import optimizer
from vlalign_jax.sharding import hosts

# LLaVA-1.5 7B, up to the layer of the tower whose features it uses.
SEVEN_B = vlm.ModelConfig(
  vision=clip.VisionConfig(1024, 4096, 23, 16, 336, 14, "quick_gelu", 1e-5, (23,), False),
  projector=projector.ProjectorConfig("mlp", 1024, 4096),
  language=llama.LanguageConfig(32064, 4096, 11008, 32, 32, 32, 128, 1e-5, rope.RopeConfig()),
  image_token_id=32063,
  image_mean=(0.48145466, 0.4578275, 0.40821073),
  image_std=(0.26862954, 0.26130258, 0.27577711),
)
TINY = vlm.ModelConfig(
  vision=clip.VisionConfig(64, 128, 2, 2, 28, 7, "quick_gelu", 1e-5, (2,), False),
  projector=projector.ProjectorConfig("mlp", 64, 128),
  language=llama.LanguageConfig(512, 128, 256, 4, 2, 2, 64, 1e-5, rope.RopeConfig()),
  image_token_id=511,
  image_mean=(0.5,) * 3,
  image_std=(0.25,) * 3,
)


def architecture(config, tiny: bool, layers: int | None = None) -> vlm.ModelConfig:
  """Returns SEVEN_B or TINY, with so many decoder layers and the adapters of a run's config."""
  model = TINY if tiny else SEVEN_B
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
  """Returns (state, frozen parameters, reference or None) of a program with random parameters."""
  params = random_params(program.params)
  params, frozen = trees.split(params, functools.partial(optimizer.is_trained, config=config))
  reference = None if program.reference is None else copied(params, program.reference)
  return program.init_state(params), frozen, reference


def copied(params, shapes):
  """Returns copies of those of `params` that `shapes` holds, in its dtypes."""
  flat = trees.flatten(params)
  return trees.map_paths(
    lambda path, leaf: jnp.array(flat[path], dtype=leaf.dtype, copy=True), shapes
  )


def sequence(model, rng, prompt: int, answers: list[int]) -> dict:
  """Returns one example as a row holds it: an image, a prompt, and answers that are learned.

  Args:
    model: the architecture.
    rng: draws the text.
    prompt: tokens of text before the answers.
    answers: tokens of each.
  """
  image, image_id = model.tokens_per_image, model.image_token_id
  trunk = np.concatenate([np.full(image, image_id), rng.integers(5, image_id, prompt)])
  before = len(trunk) - 1
  # Every answer begins with a copy of the prompt's last token.
  parts = [trunk[:-1]] + [np.append(trunk[-1:], rng.integers(5, image_id, n)) for n in answers]
  sizes = [len(part) for part in parts]
  tokens, ends = np.concatenate(parts), np.cumsum(sizes) - 1
  positions = np.concatenate([np.arange(before), *(before + np.arange(n) for n in sizes[1:])])
  branches = np.repeat(np.arange(len(parts)), sizes)
  weights = branches > 0
  weights[ends] = False
  return {
    "tokens": tokens,
    "positions": positions,
    "branches": branches,
    "targets": np.where(weights, np.roll(tokens, -1), 0),
    "loss_mask": weights,
    "image_slots": np.where(tokens == image_id, positions, -1),
    "ends": ends[1:],
  }


def to_device(model, mesh, rows: list[list[dict]], pictures):
  """Returns rows of several examples each, all of one length, on the device.

  Args:
    model: the architecture.
    mesh: over which rows are split.
    rows: of examples of `sequence`.
    pictures: int[B, I], the picture of each example; equal numbers are equal pictures.
  """
  arrays = {}
  for name in ("tokens", "positions", "branches", "targets", "loss_mask", "image_slots"):
    kind = np.float32 if name == "loss_mask" else np.int32
    arrays[name] = np.stack([np.concatenate([e[name] for e in row]) for row in rows]).astype(kind)
  segments = [np.repeat(1 + np.arange(len(row)), [len(e["tokens"]) for e in row]) for row in rows]
  arrays["segments"] = np.stack(segments).astype(np.int32)
  # Slots count on from one image of a row to the next.
  slots = arrays["image_slots"] + (arrays["segments"] - 1) * model.tokens_per_image
  arrays["image_slots"] = np.where(arrays["image_slots"] >= 0, slots, -1).astype(np.int32)
  size, pictures = model.vision.image_size, np.asarray(pictures)
  shape = (pictures.max() + 1, size, size, 3)
  drawn = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
  return hosts.to_device(mesh, arrays | {"images": drawn[pictures]})


def packed_rows(model, mesh, rows: int, length: int, examples: int):
  """Returns rows on the device: so many examples each, an image and text that is learned."""
  rng = np.random.default_rng(0)
  text = length // examples - model.tokens_per_image
  assert text > 1, "an example holds an image and text"
  made = [[sequence(model, rng, 0, [text]) for _ in range(examples)] for _ in range(rows)]
  return to_device(model, mesh, made, np.arange(rows * examples).reshape(rows, examples))


def pair_rows(model, mesh, pairs: int, prompt: int, answer: int):
  """Returns (rows of a prompt with two answers, rows of one answer each, pair by pair)."""
  shared, separate = [], []
  for number in range(pairs):
    example = sequence(model, np.random.default_rng(number), prompt, [answer, answer])
    shared.append([example])
    for start in example["ends"] - answer:
      # The prompt as it is, then this branch in its place.
      places = np.r_[np.arange(example["ends"][0] - answer), start + np.arange(answer + 1)]
      kept = {name: x[places] for name, x in example.items() if name != "ends"}
      separate.append([kept | {"branches": np.minimum(kept["branches"], 1)}])
  first = to_device(model, mesh, shared, np.arange(pairs)[:, None])
  places = {
    "answers": np.stack([row[0]["ends"] for row in shared])[:, None].astype(np.int32),
    "examples": np.arange(pairs, dtype=np.int32)[:, None],
  }
  second = to_device(model, mesh, separate, np.repeat(np.arange(pairs), 2)[:, None])
  return first | hosts.to_device(mesh, places), second


def prompt_rows(rows: dict) -> dict:
  """Returns what of rows with one example each is given to the sampler."""
  names = ("tokens", "positions", "segments", "image_slots", "images")
  return {name: rows[name] for name in names}


def step_flops(model, rows: int, length: int, images: int, learned: int, trained: bool) -> float:
  """Returns a step's operations by the plain formula, without what remat computes again.

  6 for each parameter and token (4 where the weights stay), the head's for learned tokens; causal
  attention over whole rows, 6 B L T^2 W; and the frozen tower's forward pass.

  Args:
    model: the architecture.
    rows: B.
    length: T.
    images: of all rows.
    learned: tokens that the head sees.
    trained: whether the decoder's weights are; else adapters are, which are not counted.
  """
  layer, head = decoder_sizes(model)
  language, vision = model.language, model.vision
  each = 6 if trained else 4
  decoder = each * (language.layers * layer * rows * length + head * learned)
  attention = 6 * rows * language.layers * length**2 * language.heads * language.head_dim
  tokens = vision.tokens
  tower = vision.layers * (4 * vision.width**2 + 2 * vision.width * vision.mlp_width)
  tower = 2 * images * tokens * (tower + 2 * vision.layers * tokens * vision.width)
  return decoder + attention + tower
