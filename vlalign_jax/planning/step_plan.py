"""What a training step takes on devices: its programs, compiled one after the other."""

import dataclasses
import math
from collections.abc import Callable

import jax

from vlalign_jax.config_checks import Config
from vlalign_jax.hlo.loops import Trips
from vlalign_jax.planning.compiled import Compiled, compile_program
from vlalign_jax.planning.topology import Topology
from vlalign_jax.sharding import roofline


@dataclasses.dataclass(frozen=True)
class StepProgram:
  """One compiled function of a step.

  Attributes:
    name: shown in reports.
    times: runs in a step.
    trips: how often loops run whose count depends on data.
    lower: () -> the result of `jax.jit(...).lower(...)`.
    held: bytes that a device holds while it runs, besides what is resident and its own.
    compiled: what the compiler says; None until it is compiled.
    time: of one run; None if the chip's speed is not known or the program is refused.
  """

  name: str
  times: int
  trips: Trips
  lower: Callable
  held: float = 0.0
  compiled: Compiled | None = None
  time: roofline.Time | None = None


@dataclasses.dataclass(frozen=True)
class StepPlan:
  """The programs of a step, and what is known besides.

  Attributes:
    config: of the run.
    topology: the devices.
    mesh: over all of them.
    programs: of a step, in order.
    resident: name -> bytes that a device holds while any of the programs runs.
    parameters: part of the model -> number of parameters ("all") and of trained ones ("trained").
    tokens: of a step, padding included.
    model_flops: operations that the model needs, see `model_flops`; None if not counted.
    summary: lines about how the step is laid out.
    assumptions: sentences for the reader.
  """

  config: Config
  topology: Topology
  mesh: jax.sharding.Mesh
  programs: tuple[StepProgram, ...]
  resident: dict[str, float]
  parameters: dict[str, dict[str, int]]
  tokens: int
  model_flops: float | None
  summary: tuple[str, ...]
  assumptions: tuple[str, ...]

  def total(self, program: StepProgram) -> float:
    """Returns the bytes of a device while a program runs, with everything that is resident."""
    compiled = program.compiled
    if compiled.refused or len(self.programs) == 1:
      return compiled.total
    # The compiler would count twice what two models of a program share.
    return sum(self.resident.values()) + program.held + compiled.temporaries

  @property
  def largest(self) -> StepProgram:
    """Returns the program that takes most memory."""
    return max(self.programs, key=self.total)

  @property
  def refused(self) -> tuple[StepProgram, ...]:
    """Returns the programs that the compiler refuses, as they are larger than the device."""
    return tuple(program for program in self.programs if program.compiled.refused)

  @property
  def fits(self) -> bool:
    """Returns whether all programs fit on a device."""
    return not self.refused and self.total(self.largest) <= self.topology.chip.memory

  @property
  def seconds(self) -> float | None:
    """Returns the estimated time of a step; None if there is no estimate."""
    if any(program.time is None for program in self.programs):
      return None
    return sum(program.times * program.time.total for program in self.programs)

  @property
  def utilization(self) -> float | None:
    """Returns MFU: the model's operations over those that all chips could do in a step's time."""
    flops = self.topology.chip.flops
    if self.seconds is None or self.model_flops is None or flops is None:
      return None
    return self.model_flops / (self.seconds * self.mesh.size * flops)


def compile_plan(plan: StepPlan, show: Callable[[str], None] = lambda line: None) -> StepPlan:
  """Returns the plan with each of its programs compiled.

  Args:
    plan: from `train_step.plan` or `ppo.plan`.
    show: called with a line for each program, as large ones take minutes.
  """
  programs = []
  for program in plan.programs:
    compiled = compile_program(program.lower, plan.mesh.size, plan.topology.kind, program.trips)
    show(f"{program.name}: compiled in {compiled.seconds:.0f} s")
    work = compiled.flops, compiled.bytes_accessed, compiled.sent
    time = None if compiled.refused else roofline.estimate(plan.topology.chip, *work)
    programs.append(dataclasses.replace(program, compiled=compiled, time=time))
  return dataclasses.replace(plan, programs=tuple(programs))


def device_bytes(tree) -> float:
  """Returns the bytes of a device's own memory that arrays with these shardings take."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
    if leaf.sharding.memory_kind not in ("pinned_host", "unpinned_host")
  )
