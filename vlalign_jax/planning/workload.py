"""What one step works on, and the assumptions behind it."""

import dataclasses
import math

from vlalign_jax.errors import InputError
from vlalign_jax.models import tiles
from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.sharding import mesh as meshes


@dataclasses.dataclass(frozen=True)
class Workload:
  """A step's rows.

  Attributes:
    rows: of the whole step, over all devices.
    length: tokens of a row.
    images: of a row.
    blocks: over how many devices rows are split.
    accumulation: micro-batches.
    platform: tpu, gpu or cpu; `models.attention` differs.
    assumptions: sentences for the reader.
  """

  rows: int
  length: int
  images: int
  blocks: int
  accumulation: int
  platform: str
  assumptions: tuple[str, ...] = ()

  @property
  def tile(self) -> int:
    """Queries and keys that attention works on at a time."""
    return tiles.CPU_TILE if self.platform == "cpu" else tiles.TILE

  def saves_scores(self, part: str) -> bool:
    """Whether remat `save_matmuls` keeps attention's products.

    It does not see those of a TPU's kernel and of the loops that skip tiles on CPUs; both are for
    the language model's causal attention.
    """
    return self.platform == "gpu" or part == "vision"

  @property
  def device_rows(self) -> int:
    """Rows of a micro-batch on one device."""
    return self.rows // (self.blocks * self.accumulation)

  @property
  def tokens(self) -> int:
    """Of the whole step, padding included."""
    return self.rows * self.length


def make_workload(
  config, model: ModelConfig, mesh, examples_per_row: int = 1, platform: str = "tpu"
) -> Workload:
  """The rows of a step of `config.batch_size` examples.

  Args:
    config: of the run.
    model: the architecture.
    mesh: over which rows are split.
    examples_per_row: how many examples packing puts into a row.
    platform: tpu, gpu or cpu.

  Raises:
    InputError: the rows cannot be spread over the mesh, or the images do not fit into a row.
  """
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
    blocks=blocks,
    accumulation=config.grad_accumulation,
    platform=platform,
    assumptions=(
      f"{config.batch_size} examples, {examples_per_row} a row of {length} tokens with {images} "
      f"image{'s' * (images > 1)}: {rows} rows",
    )
    + ((f"{rows - wanted} of the rows are padding",) if rows > wanted else ()),
  )


def tile_pairs(length: int, tile: int, causal: bool) -> float:
  """(query, key) pairs of a row that attention computes: whole tiles, none above the diagonal."""
  count = math.ceil(length / tile)
  size = math.ceil(length / count)
  return (count * (count + 1) / 2 if causal else count**2) * size**2
