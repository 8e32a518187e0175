"""A plan: a run's step, built as training builds it, with what it takes on devices of some kind."""

import copy
import dataclasses
import math

from vlalign_jax import config as configs
from vlalign_jax.errors import InputError
from vlalign_jax.models.vlm import LANGUAGE, ModelConfig
from vlalign_jax.planning import architectures, compiled, flops, hlo, memory, roofline, workload
from vlalign_jax.planning.topology import Topology
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.steps import dpo, reward, sft
from vlalign_jax.weights import source

STAGES = {"sft": sft, "reward": reward, "dpo": dpo}
PPO = "ppo"  # its steps are several programs: see `planning.ppo`
# Of a learning-rate schedule that has no part in what is planned.
_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is known of a step.

  Attributes:
    config: of the run.
    model: the architecture.
    topology: the devices.
    mesh: over all of them.
    program: `steps.program.Program`.
    work: rows of a step.
    memory: bytes on a device, by formula.
    operations: by part, over all devices, by formula.
    compiled: the compiler's word; None where it was not asked.
    time: of a step; None where the chip's speed is not known.
  """

  config: object
  model: ModelConfig
  topology: Topology
  mesh: object
  program: object
  work: workload.Workload
  memory: memory.Memory
  operations: dict[str, flops.Work]
  compiled: compiled.Compiled | None
  time: roofline.Time | None

  @property
  def total(self) -> float:
    """Bytes that the step takes on a device: by the compiler's word, or else by formula."""
    return self.compiled.total if self.compiled else self.memory.estimate

  @property
  def fits(self) -> bool:
    """Whether the step fits on a device."""
    return self.total <= self.topology.chip.memory

  @property
  def device_flops(self) -> float:
    """Operations on one device, by formula."""
    return sum(part.total for part in self.operations.values()) / self.mesh.size


def model_config(config) -> ModelConfig:
  """The architecture of a run: of the weights that it names, or else of published size.

  Raises:
    InputError: the config names neither, or adapters that sit nowhere.
  """
  if config.model.init_from or config.model.vision or config.model.language:
    return source.open_for(config).config
  if not config.model.architecture:
    raise InputError(
      "the config names no model: give config.model.init_from, or config.model.architecture="
      f"{' | '.join(architectures.MODELS)} to plan before the weights are there"
    )
  model = architectures.published(config.model)
  model = dataclasses.replace(model, head=source.HEADS.get(config.stage, LANGUAGE))
  return source.with_adapters(model, config.lora)


def check(config) -> None:
  """Refuses what no run can have; data is not needed for a plan.

  Raises:
    InputError: names the first such key.
  """
  if config is None:
    raise InputError("--config is missing: such as --config=configs/sft.py:llava15_7b")
  if config.stage not in (*STAGES, PPO):
    raise InputError(
      f"config.stage is {config.stage!r}, which has no step to plan; choose from "
      f"{', '.join((*STAGES, PPO))}"
    )
  planned = copy.deepcopy(config)
  planned.data.train = planned.data.train or "unknown yet"
  if config.stage == PPO and not config.ppo.reward_function:
    planned.ppo.reward_model = planned.ppo.reward_model or "unknown yet"
  configs.check(planned, config.stage)


def build(config, model: ModelConfig, mesh):
  """The step's program, as training builds it."""
  return STAGES[config.stage].make_program(config, model, mesh, _STEPS)


def plan(
  config,
  model: ModelConfig,
  topology: Topology,
  examples_per_row: int = 1,
  answers: int = 2,
  program=None,
) -> Plan:
  """A plan by formula.

  Args:
    config: of the run.
    model: the architecture.
    topology: the devices.
    examples_per_row: how many examples packing puts into a row.
    answers: ranked answers of an example, where the stage learns from such.
    program: of the same mesh and ZeRO stage, if there is one already.

  Raises:
    InputError: mesh, batch or model do not fit together.
  """
  mesh = meshes.make_mesh(config.mesh, topology.devices)
  meshes.check_heads(mesh, model.language.heads, model.language.kv_heads)
  work = workload.make_workload(config, model, mesh, examples_per_row, topology.kind, answers)
  program = program or build(config, model, mesh)
  needed = memory.count(program, config, model, mesh, work)
  operations = flops.count(program, config, model, work)
  time = roofline.estimate(
    topology.chip,
    sum(part.total for part in operations.values()) / mesh.size,
    roofline.moved(
      program, config, needed, work, model.language, operations["attention"].share(mesh.size)
    ),
    roofline.sent(program, config, mesh, work, model.language),
  )
  return Plan(
    config, model, topology, mesh, program, work, needed, operations, compiled=None, time=time
  )


def compile_plan(planned: Plan) -> Plan:
  """The plan with the compiler's word on it; the links' time is of the collectives it chose."""
  work, mesh = planned.work, planned.mesh
  program = build(planned.config, planned.model, mesh)
  rows = workload.abstract_rows(planned.config, planned.model, mesh, work)
  trips = hlo.Trips(
    # The output head stops where no tokens are left to learn: at most all are.
    to_unknown=-(-work.device_rows * work.length // meshes.head_chunk(mesh)),
    # Attention goes up to the tile of the queries, of which there are as many as of keys. On CPUs
    # it starts at the first tile with keys of the example: at most at the row's.
    from_unknown=(math.ceil(work.length / work.tile) + 1) / 2,
    to_counter=(math.ceil(work.length / work.tile) + 1) / 2,
  )
  lowered = program.train_step.lower(program.state, program.frozen, rows)
  done = compiled.compile_lowered(lowered, mesh.size, planned.topology.kind, trips)
  time = planned.time
  if time is not None and not done.refused:
    sent = sum(kind.bytes for kind in done.traffic.values())
    time = dataclasses.replace(
      time, interconnect=roofline.seconds_to_send(planned.topology.chip, sent)
    )
  return dataclasses.replace(planned, program=program, compiled=done, time=time)
