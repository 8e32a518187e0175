"""The time of a step from what a chip can do at best, and how much of that to expect."""

import dataclasses

import jax.numpy as jnp

from vlalign_jax import trees
from vlalign_jax.planning.chips import Chip

# Of the maker's numbers, what large products and transfers reach.
UTILISATION = {"compute": 0.6, "memory": 0.8, "interconnect": 0.5}
# Of the shorter two of the three, the share that is not hidden behind the longest.
EXPOSED = 0.25
ASSUMPTION = (
  "time: at {compute:.0%} of the chip's FLOP/s, {memory:.0%} of its memory's and "
  "{interconnect:.0%} of its links'\n    bandwidth; the longest of the three, and {exposed:.0%} of "
  "the other two, which do not overlap"
).format(**UTILISATION, exposed=EXPOSED)


@dataclasses.dataclass(frozen=True)
class Time:
  """Seconds of a step by what would bound it."""

  compute: float
  memory: float
  interconnect: float

  @property
  def step(self) -> float:
    longest = max(self.compute, self.memory, self.interconnect)
    rest = self.compute + self.memory + self.interconnect - longest
    return longest + EXPOSED * rest

  @property
  def bound(self) -> str:
    """What takes the longest."""
    times = dataclasses.asdict(self)
    return max(times, key=times.get)


def estimate(chip: Chip, flops: float, moved: float, sent: float) -> Time | None:
  """Seconds of a step on one device; None where the chip's speed is not known.

  Args:
    chip: the device.
    flops: operations on one device.
    moved: bytes between HBM and cores.
    sent: bytes to other devices.
  """
  if chip.flops is None:
    return None
  return Time(
    compute=flops / (chip.flops * UTILISATION["compute"]),
    memory=moved / (chip.bandwidth * UTILISATION["memory"]),
    interconnect=seconds_to_send(chip, sent),
  )


def seconds_to_send(chip: Chip, sent: float) -> float:
  """Seconds that a device's links take."""
  return sent / (chip.interconnect * UTILISATION["interconnect"])


def of_passes(
  chip: Chip,
  flops: float,
  weights: int,
  config,
  mesh,
  passes: int,
  *,
  gathers: int | None = None,
  moved: float = 0.0,
) -> Time | None:
  """Seconds of passes that learn nothing; None where the chip's speed is not known.

  Each reads all weights. Activations, and the sums of `tensor`, are left out: they take less.

  Args:
    chip: the device.
    flops: operations over all devices.
    weights: parameters of the model.
    config: that it is placed by.
    mesh: over which it runs.
    passes: how many.
    gathers: how often ZeRO 3 brings all layers together; None: in each pass.
    moved: further bytes between HBM and cores on one device.
  """
  size = jnp.dtype(config.model.dtype).itemsize
  read = weights * size / mesh.shape["tensor"]
  times = passes if gathers is None else gathers
  sent = times * read * (1 - 1 / mesh.shape["fsdp"]) * (config.mesh.zero_stage >= 3)
  return estimate(chip, flops / mesh.size, passes * read + moved, sent)


def moved(program, config, memory, workload, language, attention) -> float:
  """Bytes between HBM and cores in a step on one device, by formula.

  Weights are read for the forward pass, for what is computed again and for both products of the
  backward pass, of which frozen ones have but one; every layer's activations are written and read
  about as often as `remat: none` would save them; the optimizer reads and writes all that it holds.
  A reference in the step is one more forward pass. Without a kernel, each product of attention has
  its tile of scores written and read, in float32.

  Args:
    program: `steps.program.Program`.
    config: of the run.
    memory: bytes on a device.
    workload: of the step.
    language: the language model's architecture.
    attention: `flops.Work` of its attention on a device.
  """
  size = jnp.dtype(config.model.dtype).itemsize
  reference = "reference" in program.frozen
  passes = 3 + (config.model.remat == "full") + reference
  frozen = trees.size(program.params) - trees.size(program.state.params)
  weights = trees.size(program.params) * passes - frozen
  tokens = workload.device_rows * workload.length
  widths = 12 * language.width + 8 * language.mlp_width
  activations = passes * tokens * widths * size * language.layers
  products = (attention.total + attention.forward * reference) / (2 * language.head_dim)
  scores = 2 * 4 * products * (not workload.has_kernel)
  update = 2 * (memory.params + memory.optimizer + memory.gradients)
  sums = 2 * memory.gradients * workload.accumulation
  return workload.accumulation * (weights * size + activations) + scores + update + sums


def sent(program, config, mesh, workload, language) -> float:
  """Bytes that one device sends in a step, by formula, each collective in a ring.

  Every micro-batch sums its gradients, from ZeRO 2 on so that each device gets its part. ZeRO 3
  gathers every layer for each pass, a reference's too; 1 and 2 gather once what was updated.
  `tensor` sums activations four times a layer, and twice more where they are computed again.
  """
  size = jnp.dtype(config.model.dtype).itemsize
  data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
  stage, micro = config.mesh.zero_stage, workload.accumulation
  trained = trees.size(program.state.params) / tensor
  everything = trees.size(program.params) / tensor
  ring = lambda parts: (parts - 1) / parts  # noqa: E731

  total = micro * ring(fsdp) * size * trained * (1 if stage >= 2 else 2)
  total += micro * 2 * ring(data) * size * trained / (fsdp if stage >= 2 else 1)
  if stage == 3:
    passes = 2 + (config.model.remat == "full") + ("reference" in program.frozen)
    total += micro * ring(fsdp) * size * everything * passes
  elif stage:
    total += ring(fsdp) * jnp.dtype(config.model.param_dtype).itemsize * trained
  tokens = workload.device_rows * workload.length
  sums = 4 + 2 * (config.model.remat == "full")
  activations = sums * 2 * ring(tensor) * tokens * language.width * size * language.layers
  return total + micro * activations
