"""A plan of PPO: a rollout and its updates, program by program as a step of a run has them."""

import dataclasses
from collections.abc import Callable

from vlalign_jax.planning import compiled, memory, ppo_models, ppo_phases, roofline
from vlalign_jax.planning.ppo_phases import Phase
from vlalign_jax.planning.topology import Topology
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.steps import ppo_program

# Of a learning-rate schedule that has no part in what is planned.
_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is known of a step.

  Attributes:
    config: of the run.
    models: of the run.
    topology: the devices.
    mesh: over all of them.
    program: `steps.ppo_program.Program`.
    held: what it is -> bytes that a device holds all the time.
    rollout: bytes of a rollout's rows on a device.
    cache: bytes of keys and values on a device, while sampling.
    phases: of a step, in their order.
    assumptions: sentences for the reader.
  """

  config: object
  models: ppo_models.Models
  topology: Topology
  mesh: object
  program: ppo_program.Program
  held: dict[str, float]
  rollout: float
  cache: float
  phases: tuple[Phase, ...]
  assumptions: tuple[str, ...]

  def total(self, phase: Phase) -> float:
    """Bytes of a device while a phase runs."""
    return sum(self.held.values()) + self.rollout + phase.needed

  @property
  def largest(self) -> Phase:
    """The phase that takes most memory."""
    return max(self.phases, key=self.total)

  @property
  def fits(self) -> bool:
    """Whether all phases fit on a device, and the compiler refused none."""
    refused = any(phase.compiled and phase.compiled.refused for phase in self.phases)
    return not refused and self.total(self.largest) <= self.topology.chip.memory

  @property
  def seconds(self) -> float | None:
    """Of a step; None where the chip's speed is not known."""
    if any(phase.time is None for phase in self.phases):
      return None
    return sum(phase.times * phase.time.step for phase in self.phases)


def plan(config, topology: Topology) -> Plan:
  """A plan by formula.

  Raises:
    InputError: mesh, batch or models do not fit together.
  """
  mesh = meshes.make_mesh(config.mesh, topology.devices)
  parts = config.ppo.minibatches * config.grad_accumulation
  meshes.check_batch(config.batch_size, parts, config.data.pack, mesh)
  models = ppo_models.open_models(config)
  program = ppo_program.make_program(
    config, models.actor, models.critic, models.reward, models.sampling, mesh, _STEPS
  )
  given = ppo_phases.Given(config, models, topology, mesh, program)
  ppo_phases.check(given)
  return Plan(
    config=config,
    models=models,
    topology=topology,
    mesh=mesh,
    program=program,
    held=ppo_models.held(models, program, config),
    rollout=memory.device_bytes(given.rows() | given.fields()),
    cache=given.cache,
    phases=tuple(ppo_phases.phases(given)),
    assumptions=(*_assumptions(given), *models.assumptions),
  )


def _assumptions(given: ppo_phases.Given) -> list[str]:
  settings, (B, L, I, N, M, T) = given.config.ppo, given.sizes
  plural = lambda count: "s" * (count > 1)  # noqa: E731
  said = [
    f"{B} prompts of {L} tokens with {I} image{plural(I)} each, and {N} answer{plural(N)} of {M} "
    f"tokens: rows of {T}"
  ]
  if settings.critic_warmup:
    said.append("the actor learns, too: updates of the critic alone take less")
  if settings.sft_weight:
    said.append(f"each update has {B // settings.minibatches} conversations of {L} tokens besides")
  if settings.reward_function:
    said.append("the reward function's own time is not counted")
  return said


def compile_plan(planned: Plan, show: Callable[[str], None] = lambda line: None) -> Plan:
  """The plan with the compiler's word on each phase, one after the other.

  Args:
    planned: of `plan`.
    show: told of each phase, as large programs take minutes.
  """
  chip, kind, found = planned.topology.chip, planned.topology.kind, []
  for phase in planned.phases:
    done = compiled.compile_lowered(phase.lower(), planned.mesh.size, kind, phase.trips)
    show(f"{phase.name}: compiled in {done.seconds:.0f} s")
    time = phase.time
    if time is not None and not done.refused:
      sent = sum(traffic.bytes for traffic in done.traffic.values())
      time = dataclasses.replace(time, interconnect=roofline.seconds_to_send(chip, sent))
    found.append(dataclasses.replace(phase, compiled=done, time=time))
  return dataclasses.replace(planned, phases=tuple(found))
