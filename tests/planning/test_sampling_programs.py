"""The sampler's program compiled for TPUs, and for GPUs where their compiler is installed."""

import functools
import math
from unittest import mock

import pytest

from tests.planning import small
from vlalign_jax import trees
from vlalign_jax.hlo import collectives
from vlalign_jax.hlo.loops import Trips, executed
from vlalign_jax.hlo.parser import HloProgram, Instruction, arrays, parse
from vlalign_jax.planning import ppo, topology, train_step

pytestmark = pytest.mark.slow

needs_cuda = pytest.mark.skipif(not topology.has_cuda_plugin(), reason=topology.INSTALL_CUDA)
NEW_TOKENS = 24
# Sizes of weights that no activation has.
MODEL = small.model(width=256)
ROWS, SLOTS = 64, 48
TURNS = Trips(to_unknown=NEW_TOKENS - 1)


@functools.cache
def compiled(devices: str, sampling_mesh: str, slots: int = 0) -> tuple[HloProgram, dict, tuple]:
  """Compiles the program that decodes.

  Returns:
    (the program, path -> shape of the language model's parameters on a device, (rows, key heads) of
    the cache on a device).
  """
  c = small.config(
    "ppo",
    data__pack=False,
    model__architecture="small",
    batch_size=ROWS,
    mesh__data=1,
    mesh__fsdp=-1,
    mesh__zero_stage=3,
    lora__rank=8,
    train__projector=False,
    ppo__max_new_tokens=NEW_TOKENS,
    ppo__sampling_mesh=sampling_mesh,
    ppo__slots=slots,
  )
  with mock.patch.object(train_step.published, "published", return_value=MODEL):
    small.check(c)
    plan = ppo.plan(c, topology.open_topology(devices))
    sampling = next(program for program in plan.programs if program.name == "sampling")
    program = parse(sampling.lower().compile().as_text())
    model = train_step.source.with_adapters(MODEL, c.lora)
  abstract = train_step.program.abstract_params(model)[1]["language"]
  sizes = {path: leaf.shape for path, leaf in trees.flatten(abstract).items()}
  tensor = 4 if sampling_mesh == "tensor=4" else 1
  rows = (slots or ROWS) // (len(topology.open_topology(devices).devices) // tensor)
  return program, sizes, (rows, MODEL.language.kv_heads // tensor)


def in_the_loop(program: HloProgram):
  """Yields the instructions that run for every token, and their computations."""
  for instruction, computation, times in executed(program, TURNS):
    if times >= TURNS.to_unknown:
      yield instruction, computation


def moved_in_the_loop(program: HloProgram, language: dict) -> list[str]:
  """Returns the collectives of parameters that a rollout runs for every token."""
  sizes = {math.prod(shape[1:]) for shape in language.values() if len(shape) == 3}
  sizes |= {math.prod(language[name]) for name in ("embedding/embedding", "head/kernel")}
  found = []
  for instruction, _ in in_the_loop(program):
    kind = instruction.opcode.removesuffix("-start")
    if kind in collectives.KINDS:
      shapes = [shape for _, shape in arrays(instruction.shape)]
      found += [f"{kind} {shape}" for shape in shapes if math.prod(shape) in sizes]
  return found


def cache_writes(program: HloProgram, rows: int, heads: int) -> tuple[list[str], list[str]]:
  """Returns what writes a cache of all layers for every token: (a slice of it, all of it).

  Args:
    program: compiled.
    rows, heads: of the cache on a device.
  """
  language = MODEL.language
  vectors = language.layers * rows * heads * language.head_dim
  sizes = {vectors * small.LENGTH, vectors * (NEW_TOKENS - 1)}  # of prompts, and of answers
  updates, copies = [], []
  for instruction, computation in in_the_loop(program):
    shapes = [shape for _, shape in arrays(instruction.shape)]
    if any(math.prod(shape) in sizes for shape in shapes):
      opcode = _written_by(program, instruction)
      if opcode == "dynamic-update-slice":
        updates.append(instruction.name)
      elif opcode in ("copy", "copy-start", "transpose", "convert", "concatenate", "fusion"):
        copies.append(f"{opcode} {shapes} in {computation.name}")
  return updates, copies


def _written_by(program: HloProgram, instruction: Instruction) -> str:
  """Returns the opcode of an instruction; of a fusion that updates a slice, the update's."""
  if instruction.opcode != "fusion":
    return instruction.opcode
  inside = program.computations[instruction.attribute("calls")]
  root = inside.root
  while root.opcode == "bitcast":
    root = inside.instructions[root.operands[0]]
  return root.opcode if root.opcode == "dynamic-update-slice" else "fusion"


def cast_ahead_of_the_loop(program: HloProgram, language: dict, tensor: int = 1) -> list[str]:
  """Returns the casts of all layers' weights, or of whole tables."""
  sizes = {math.prod(shape) for shape in language.values() if len(shape) >= 2}
  sizes |= {size // tensor for size in sizes}
  found = []
  for instruction, _, times in executed(program, TURNS):
    shapes = [shape for _, shape in arrays(instruction.shape)]
    if instruction.opcode == "convert" and times == 1:
      found += [str(shape) for shape in shapes if math.prod(shape) in sizes]
  return found


CASES = [
  pytest.param(devices, slots, marks=needs_cuda if devices.startswith("gpu") else ())
  for devices in ("v5e:2x4", "v5p:2x2x4", "gpu:h100x8")
  for slots in (0, SLOTS)
]


@pytest.mark.parametrize(("devices", "slots"), CASES)
def test_the_decode_loop_moves_no_parameters_and_copies_no_cache(devices, slots):
  program, language, cache = compiled(devices, "tensor=4", slots)
  assert moved_in_the_loop(program, language) == []
  updates, copies = cache_writes(program, *cache)
  assert len(updates) >= 2  # keys, and values
  assert copies == []
  assert cast_ahead_of_the_loop(program, language, 4) == []


@needs_cuda
def test_one_gpu_copies_no_cache():
  program, language, cache = compiled("gpu:h100x1", "auto")
  updates, copies = cache_writes(program, *cache)
  assert len(updates) >= 2
  assert copies == []
  assert cast_ahead_of_the_loop(program, language) == []


def test_zero_3_in_place_moves_parameters_for_every_token():
  program, language, _ = compiled("v5e:2x4", "")
  assert moved_in_the_loop(program, language) != []
