"""What one step works on, and the assumptions behind it."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from vlalign_jax.errors import InputError
from vlalign_jax.models import tiles
from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.steps import program
from vlalign_jax.steps.dpo import CACHED

# Stages that learn from several answers to a prompt, ranked.
RANKED = ("reward", "dpo")


@dataclasses.dataclass(frozen=True)
class Workload:
  """A step's rows.

  Attributes:
    rows: of the whole step, over all devices.
    length: tokens of a row.
    images: of a row.
    examples: of a row.
    answers: ranked answers of an example; 0: examples have none.
    blocks: over how many devices rows are split.
    accumulation: micro-batches.
    platform: tpu, gpu or cpu; `models.attention` differs.
    assumptions: sentences for the reader.
  """

  rows: int
  length: int
  images: int
  examples: int
  answers: int
  blocks: int
  accumulation: int
  platform: str
  assumptions: tuple[str, ...] = ()

  @property
  def tile(self) -> int:
    """Queries and keys that attention works on at a time."""
    return tiles.CPU_TILE if self.platform == "cpu" else tiles.TILE

  @property
  def has_kernel(self) -> bool:
    """Whether a TPU's kernel computes causal attention; it knows nothing of answers to a prompt."""
    return self.platform == "tpu" and not self.answers

  @property
  def device_rows(self) -> int:
    """Rows of a micro-batch on one device."""
    return self.rows // (self.blocks * self.accumulation)

  @property
  def tokens(self) -> int:
    """Of the whole step, padding included."""
    return self.rows * self.length


def make_workload(
  config,
  model: ModelConfig,
  mesh,
  examples_per_row: int = 1,
  platform: str = "tpu",
  answers: int = 2,
) -> Workload:
  """The rows of a step of `config.batch_size` examples.

  Args:
    config: of the run.
    model: the architecture.
    mesh: over which rows are split.
    examples_per_row: how many examples packing puts into a row.
    platform: tpu, gpu or cpu.
    answers: ranked answers of an example, where the stage learns from such.

  Raises:
    InputError: the rows cannot be spread over the mesh, or the images do not fit into a row.
  """
  ranked = config.stage in RANKED
  if ranked and not 2 <= answers <= config.data.max_candidates:
    raise InputError(
      f"--answers={answers}: at least 2, and at most config.data.max_candidates="
      f"{config.data.max_candidates}"
    )
  if examples_per_row < 1 or (examples_per_row > 1 and not config.data.pack):
    raise InputError(
      f"--examples-per-row={examples_per_row}: at least 1, and more only with config.data.pack"
    )
  meshes.check_batch(config.batch_size, config.grad_accumulation, config.data.pack, mesh)
  blocks = meshes.row_blocks(mesh)
  shares = blocks * config.grad_accumulation
  wanted = -(-config.batch_size // examples_per_row)
  rows = -(-wanted // shares) * shares
  length = config.data.max_length
  images = config.data.max_images or examples_per_row
  if images * model.tokens_per_image > length:
    raise InputError(
      f"{images} images of {model.tokens_per_image} tokens do not fit into rows of "
      f"config.data.max_length={length}; raise it, or lower --examples-per-row"
    )
  return Workload(
    rows=rows,
    length=length,
    images=images,
    examples=examples_per_row,
    answers=answers * ranked,
    blocks=blocks,
    accumulation=config.grad_accumulation,
    platform=platform,
    assumptions=(
      f"{config.batch_size} examples, {examples_per_row} a row of {length} tokens with {images} "
      f"image{'s' * (images > 1)}: {rows} rows",
    )
    + _about_answers(config, answers) * ranked
    + ((f"{rows - wanted} of the rows are padding",) if rows > wanted else ()),
  )


def _about_answers(config, answers: int) -> tuple[str, ...]:
  said = (f"each example has {answers} ranked answers, within the row's length (--answers)",)
  if config.stage == "dpo" and config.dpo.reference == CACHED:
    said += ("the reference's log-probabilities are there: a forward pass each, before training",)
  return said


def abstract_rows(config, model: ModelConfig, mesh, work: Workload) -> dict:
  """Shapes of a batch of the config's stage, with shardings."""
  rows = program.abstract_rows(model, mesh, work.rows, work.length, work.images)
  if work.answers:
    of_answers = (work.rows, work.examples, work.answers)
    shapes = {"answers": (of_answers, jnp.int32), "examples": (of_answers[:2], jnp.int32)}
    if config.stage == "dpo" and config.dpo.reference == CACHED:
      shapes["reference"] = (of_answers, jnp.float32)
    sharding = meshes.batch_sharding(mesh)
    for name, (shape, dtype) in shapes.items():
      rows[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  return rows


def tile_pairs(length: int, tile: int, causal: bool) -> float:
  """(query, key) pairs of a row that attention computes: whole tiles, none above the diagonal."""
  count, whole = math.ceil(length / tile), padded(length, tile)
  return ((1 + 1 / count) / 2 if causal else 1) * whole**2


def padded(length: int, tile: int) -> int:
  """Queries, or keys, of equal tiles that hold so many."""
  count = math.ceil(length / tile)
  return count * math.ceil(length / count)
