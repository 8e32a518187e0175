"""Compiles the programs of all stages for GPUs and TPUs that are not there, and looks at them.

python -m benchmarks.compiled_programs [--topologies=v5e:2x4,gpu:h100x1] [--stages=sft,dpo]
  [--lengths=2048] [--output=FILE]

The models have the widths of LLaVA-1.5 7B and two layers in each tower; a device has one row. For
each program it prints the attention kernels that it calls, its bytes on a device and the seconds of
compiling, as a table in Markdown. It fails if a program calls no attention kernel, or holds an
array as large as the scores of all pairs of tokens [B, H, T, T] or the logits of all tokens
[B, T, V].
"""

import collections
import dataclasses
import importlib
import math
import re
import time
from collections.abc import Iterator
from unittest import mock

from absl import app, flags

from vlalign_jax import stages
from vlalign_jax.hlo.parser import HloProgram, arrays, parse
from vlalign_jax.models.clip import VisionConfig
from vlalign_jax.models.llama import LanguageConfig
from vlalign_jax.planning import ppo, step_plan, topology, train_step
from vlalign_jax.weights import published

LAYERS = 2
PRESET = "llava15_7b"
_TPU_KERNEL, _CUDNN = re.compile(r"splash_\w+?(?:fwd|dq|dkv)\w*"), re.compile(r"__cudnn\$(\w+)")


@dataclasses.dataclass(frozen=True)
class Row:
  """A compiled program.

  Attributes:
    stage, program, topology: what it is, and for which devices.
    length: T, tokens of a row.
    kernels: the attention kernels that it calls.
    temporaries: bytes of a device, without the arguments.
    total: bytes of a device.
    seconds: of lowering and compiling.
    problems: what it must not have.
  """

  stage: str
  program: str
  topology: str
  length: int
  kernels: tuple[str, ...]
  temporaries: float
  total: float
  seconds: float
  problems: tuple[str, ...]


def compile_stage(
  stage_name: str,
  devices: topology.Topology,
  length: int,
  widths: str = "7b",
  attention: str = "auto",
) -> Iterator[Row]:
  """Compiles the programs of a stage's step with rows of `length` tokens, one on each device.

  Args:
    stage_name: of the registry.
    devices: to compile for.
    length: T.
    widths: "7b", or "narrow", which compiles faster.
    attention: the config's model.attention.
  """
  plan = make_plan(stage_name, devices, length, widths, attention)
  for program in plan.programs:
    start = time.monotonic()
    compiled = program.lower().compile()
    seconds = time.monotonic() - start
    sizes = compiled.memory_analysis()
    parsed = parse(compiled.as_text())
    kernels = find_kernels(parsed)
    problems = tuple(large_arrays(parsed, make_towers(widths)[1], length))
    if not kernels and program.name != ppo.MOVE:
      problems += ("calls no attention kernel",)
    yield Row(
      stage_name,
      program.name,
      devices.name,
      length,
      tuple(sorted(kernels)),
      sizes.temp_size_in_bytes,
      sizes.argument_size_in_bytes + sizes.temp_size_in_bytes,
      seconds,
      problems,
    )


def make_plan(
  stage_name: str, devices: topology.Topology, length: int, widths: str, attention: str
) -> step_plan.StepPlan:
  """Returns the plan of a stage's preset, with one row of `length` tokens on each device."""
  c = importlib.import_module(f"configs.{stage_name}").get_config(PRESET)
  c.batch_size, c.data.max_length = len(devices.devices), length
  c.model.attention = attention
  stage = stages.of_config(c)
  with mock.patch.dict(published.MODELS, {PRESET: published.Published(*make_towers(widths))}):
    if stage.plan is None:
      train_step.check(stage, c)
      return train_step.plan(stage, c, train_step.model_config(c, stage.head), devices)
    c.ppo.num_mini_batches = c.ppo.sample_parts = 1
    c.data.max_length = length - c.ppo.num_generations * (c.ppo.max_new_tokens + 1)
    train_step.check(stage, c)
    return stage.plan(c, devices)


def make_towers(widths: str) -> tuple[VisionConfig, LanguageConfig]:
  """Returns the towers of LLaVA-1.5 7B with two layers each, or narrow ones of their kind."""
  sizes = published.MODELS[PRESET]
  vision = dataclasses.replace(sizes.vision, layers=LAYERS, feature_layers=(LAYERS,))
  language = dataclasses.replace(sizes.language, layers=LAYERS)
  if widths == "narrow":
    vision = dataclasses.replace(vision, width=256, mlp_width=512, heads=4)
    sizes = {"width": 512, "mlp_width": 1024, "heads": 4, "kv_heads": 4, "vocab_size": 8064}
    language = dataclasses.replace(language, **sizes)
  return vision, language


def find_kernels(program: HloProgram) -> collections.Counter[str]:
  """Returns the attention kernels in the text of a program, by name, with how often they occur."""
  found: collections.Counter[str] = collections.Counter()
  for computation in program.computations.values():
    for instruction in computation.instructions.values():
      if instruction.opcode == "custom-call":
        text = instruction.name + instruction.rest
        if "tpu_custom_call" in text:
          found.update(_TPU_KERNEL.findall(text)[:1])
        found.update(_CUDNN.findall(instruction.rest)[:1])
  return found


def large_arrays(program: HloProgram, language: LanguageConfig, length: int) -> Iterator[str]:
  """Yields the arrays of a program that are as large as all scores or all logits of a device."""
  shapes = {
    sizes
    for computation in program.computations.values()
    for instruction in computation.instructions.values()
    for _, sizes in arrays(instruction.shape)
  }
  for sizes in sorted(shapes):
    tokens = [size for size in sizes if size >= length]
    pairs = len(tokens) >= 2 and math.prod(sizes) >= language.heads * length**2
    if pairs and sizes.count(tokens[0]) >= 2:
      yield f"holds {list(sizes)}: the scores of all pairs"
    rest = math.prod(sizes) / language.vocab_size
    is_weight = set(sizes) <= {language.vocab_size, language.width, 1}
    if language.vocab_size in sizes and rest >= length and not is_weight:
      yield f"holds {list(sizes)}: the logits of all tokens"


def main(_):
  topology.stay_on_host()
  lines = [
    "| stage | program | devices | T | attention kernels | temporaries GiB | GiB | compiled in |",
    "|---|---|---|---|---|---|---|---|",
  ]
  print("\n".join(lines))
  problems = []
  for name in TOPOLOGIES.value:
    devices = topology.open_topology(name)
    for stage in STAGES.value:
      for length in map(int, LENGTHS.value):
        for row in compile_stage(stage, devices, length, WIDTHS.value):
          line = (
            f"| {row.stage} | {row.program} | {row.topology} | {row.length} |"
            f" {', '.join(row.kernels) or '-'} | {row.temporaries / 2**30:.2f} |"
            f" {row.total / 2**30:.2f} | {row.seconds:.0f} s |"
          )
          print(line, flush=True)
          lines.append(line)
          problems += [f"{row.stage}, {row.program}, {name}: {one}" for one in row.problems]
  if OUTPUT.value:
    with open(OUTPUT.value, "w", encoding="utf-8") as file:
      file.write("\n".join(lines) + "\n")
  print("\n".join(problems))
  return 1 if problems else 0


if __name__ == "__main__":
  TOPOLOGIES = flags.DEFINE_list("topologies", ["v5e:2x4", "v5p:2x2x1"], "Devices.")
  STAGES = flags.DEFINE_list("stages", [*stages.STAGES], "Stages.")
  LENGTHS = flags.DEFINE_list("lengths", ["2048"], "Tokens of a row.")
  WIDTHS = flags.DEFINE_enum("widths", "7b", ("7b", "narrow"), "Widths of the models.")
  OUTPUT = flags.DEFINE_string("output", "", "Where the table is written, too.")
  app.run(main)
