"""What a step of a run takes on devices: its programs, compiled one after the other."""

import dataclasses
import math
from collections.abc import Callable

import jax

from vlalign_jax.planning import hlo, roofline
from vlalign_jax.planning.compiled import Compiled, compile_program
from vlalign_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class StepProgram:
  """One compiled function of a step.

  Attributes:
    name: of it.
    times: it runs in a step.
    trips: of its loops whose counts depend on data.
    lower: () -> what `jax.jit(...).lower(...)` gives.
    compiled: the compiler's word; None before it is asked.
    time: of one run; None where the chip's speed is not known, or the program is refused.
  """

  name: str
  times: int
  trips: hlo.Trips
  lower: Callable
  compiled: Compiled | None = None
  time: roofline.Time | None = None


@dataclasses.dataclass(frozen=True)
class StepPlan:
  """What is known of a step.

  Attributes:
    config: of the run.
    topology: the devices.
    mesh: over all of them.
    programs: of a step, in their order.
    resident: what it is -> bytes that a device holds while all of the programs run.
    parameters: part of the model -> how many there are ("all"), and are trained ("trained").
    tokens: of a step, padding included.
    model_flops: operations that the model needs, see `model_flops`; None where it is not counted.
    summary: lines about how the step is laid out.
    assumptions: sentences for the reader.
  """

  config: object
  topology: Topology
  mesh: object
  programs: tuple[StepProgram, ...]
  resident: dict[str, float]
  parameters: dict[str, dict[str, int]]
  tokens: int
  model_flops: float | None
  summary: tuple[str, ...]
  assumptions: tuple[str, ...]

  def total(self, program: StepProgram) -> float:
    """Returns the bytes of a device while a program runs, whatever else is resident included."""
    done = program.compiled
    if done.refused or len(self.programs) == 1:
      return done.total
    # The compiler would count twice what two models of a program share.
    return sum(self.resident.values()) + done.temporaries

  @property
  def largest(self) -> StepProgram:
    """The program that takes most memory."""
    return max(self.programs, key=self.total)

  @property
  def refused(self) -> tuple[StepProgram, ...]:
    """The programs that the compiler refuses, as they are larger than the device."""
    return tuple(program for program in self.programs if program.compiled.refused)

  @property
  def fits(self) -> bool:
    """Whether all programs fit on a device."""
    return not self.refused and self.total(self.largest) <= self.topology.chip.memory

  @property
  def seconds(self) -> float | None:
    """Of a step; None where it cannot be estimated."""
    if any(program.time is None for program in self.programs):
      return None
    return sum(program.times * program.time.total for program in self.programs)

  @property
  def utilization(self) -> float | None:
    """MFU: the model's operations over what all chips could do in the time of a step."""
    if self.seconds is None or self.model_flops is None:
      return None
    return self.model_flops / (self.seconds * self.mesh.size * self.topology.chip.flops)


def compile_plan(plan: StepPlan, show: Callable[[str], None] = lambda line: None) -> StepPlan:
  """Returns the plan with each of its programs compiled.

  Args:
    plan: as `train_step.plan` or `ppo.plan` makes it.
    show: is called with a line for each program, as large ones take minutes.
  """
  chip, programs = plan.topology.chip, []
  for program in plan.programs:
    done = compile_program(program.lower, plan.mesh.size, plan.topology.kind, program.trips)
    show(f"{program.name}: compiled in {done.seconds:.0f} s")
    time = roofline.estimate(chip, done.flops, done.bytes_accessed, done.sent)
    programs.append(
      dataclasses.replace(program, compiled=done, time=None if done.refused else time)
    )
  return dataclasses.replace(plan, programs=tuple(programs))


def device_bytes(tree) -> float:
  """Returns the bytes that one device's own memory holds of shapes with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
    if leaf.sharding.memory_kind not in ("pinned_host", "unpinned_host")
  )
