"""The sampler's program compiled for TPUs, and for GPUs where their compiler is installed."""

import math

import pytest

from tests.planning import small
from vlalign_jax import trees
from vlalign_jax.hlo import collectives
from vlalign_jax.hlo.loops import Trips, executed
from vlalign_jax.hlo.parser import arrays, parse
from vlalign_jax.planning import ppo, topology, train_step

pytestmark = pytest.mark.slow

needs_cuda = pytest.mark.skipif(not topology.has_cuda_plugin(), reason=topology.INSTALL_CUDA)
NEW_TOKENS = 24
# Sizes of weights that no activation has.
MODEL = small.model(width=256)


def moved_in_the_loop(monkeypatch, devices: str, sampling_mesh: str) -> list[str]:
  """Returns the collectives of parameters that a rollout runs for every token."""
  monkeypatch.setattr(train_step.published, "published", lambda group: MODEL)
  c = small.config(
    "ppo",
    data__pack=False,
    model__architecture="small",
    batch_size=64,
    mesh__data=1,
    mesh__fsdp=-1,
    mesh__zero_stage=3,
    lora__rank=8,
    train__projector=False,
    ppo__max_new_tokens=NEW_TOKENS,
    ppo__sampling_mesh=sampling_mesh,
  )
  small.check(c)
  plan = ppo.plan(c, topology.open_topology(devices))
  sampling = next(program for program in plan.programs if program.name == "sampling")
  program = parse(sampling.lower().compile().as_text())
  language = trees.flatten(_shapes(c))
  sizes = {math.prod(shape[1:]) for shape in language.values() if len(shape) == 3}
  sizes |= {math.prod(language[name]) for name in ("embedding/embedding", "head/kernel")}
  found = []
  for instruction, _, times in executed(program, Trips(to_unknown=NEW_TOKENS - 1)):
    kind = instruction.opcode.removesuffix("-start")
    if kind in collectives.KINDS and times >= NEW_TOKENS - 1:
      shapes = [shape for _, shape in arrays(instruction.shape)]
      found += [f"{kind} {shape}" for shape in shapes if math.prod(shape) in sizes]
  return found


def _shapes(c) -> dict:
  model = train_step.source.with_adapters(MODEL, c.lora)
  abstract = train_step.program.abstract_params(model)[1]["language"]
  return trees.map_paths(lambda path, leaf: leaf.shape, abstract)


DEVICES = [
  "v5e:2x4",
  "v5p:2x2x4",
  pytest.param("gpu:h100x8", marks=needs_cuda),
]


@pytest.mark.parametrize("devices", DEVICES)
def test_the_decode_loop_moves_no_parameters(devices, monkeypatch):
  assert moved_in_the_loop(monkeypatch, devices, "tensor=4") == []


def test_zero_3_in_place_moves_parameters_for_every_token(monkeypatch):
  assert moved_in_the_loop(monkeypatch, "v5e:2x4", "") != []
