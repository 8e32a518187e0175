"""Training steps at 7B widths: SFT, adapters on the whole model, DPO; and where their time goes."""

import statistics
import time

import jax
import numpy as np

from accelerator_lines import models, timing, traces
from configs import dpo as dpo_presets
from configs import sft as sft_presets
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.stages import sft as sft_steps

STEPS = 5
# Bytes of a trained parameter (itself, gradient and two moments in float32, and a bfloat16 copy),
# and what activations take in all: from these follow the first number of layers that is tried.
PARAMETER_BYTES, ACTIVATIONS, FEWER = 18, 9e9, 3


def make_config(settings, preset: str, presets=sft_presets):
  """Returns a preset's config for a constant rate from the first step."""
  c = presets.get_config(preset)
  c.optim.schedule, c.optim.warmup_ratio = "constant", 0.0
  return c


def sizes(settings, rows: int = 8) -> tuple[int, int, int]:
  """Returns rows, tokens of each and examples of each."""
  return (2, 64, 2) if settings["tiny"] else (rows, 2048, 2)


def compile_step(program, rows):
  """Returns (the compiled step, seconds, GiB that it takes in all)."""
  step, seconds = timing.compiled(
    program.train_step, program.state, program.frozen, rows, program.reference
  )
  memory = step.memory_analysis()
  total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  total += memory.output_size_in_bytes - memory.alias_size_in_bytes
  return step, seconds, total / timing.GIB


def time_steps(step, state, frozen, rows, reference=None):
  """Returns (median seconds of a step, losses), after one step of warm-up."""
  took, losses = [], []
  for number in range(STEPS + 1):
    start = time.perf_counter()
    state, metrics = step(state, frozen, rows, reference)
    jax.block_until_ready((state, metrics))
    losses.append(float(metrics["loss"]))
    if number:
      took.append(time.perf_counter() - start)
  return statistics.median(took), losses


def measure(config, model, settings, count: int = 8, again: bool = False) -> dict:
  """Returns the figures of an SFT step.

  Args:
    config: of the run.
    model: the architecture.
    settings: of the script.
    count: rows of a batch.
    again: whether to compile a second time, from the persistent cache.

  Raises:
    MemoryError: the compiled step needs more than the device has.
  """
  mesh = meshes.make_mesh(config.mesh)
  program = sft_steps.make_program(config, model, mesh, 1000)
  rows, length, examples = sizes(settings, count)
  batch = models.packed_rows(model, mesh, rows, length, examples)
  step, compiling, total = compile_step(program, batch)
  if total * timing.GIB > timing.memory_limit():
    raise MemoryError(f"the step needs {total:.1f} GiB, compiled in {compiling:.0f} s")
  result = {"layers": model.language.layers, "compile_s": compiling}
  if again:
    jax.clear_caches()
    result["compile_again_s"] = compile_step(program, batch)[1]
  state, frozen, reference = models.initial(program, config)
  took, losses = time_steps(step, state, frozen, batch, reference)
  flops = models.step_flops(
    model,
    rows,
    length,
    rows * examples,
    int(np.sum(batch["loss_mask"])),
    trained=not model.lora,
  )
  rates = timing.of_peak(flops, took)
  return result | {
    "step_s": took,
    "tokens_per_s": rows * length / took,
    "tflops": rates["tflops"],
    **({"mfu": rates["of_peak"]} if "of_peak" in rates else {}),
    "planned_GiB": total,
    "peak_GiB": timing.peak_memory(),
    "losses": [round(loss, 3) for loss in losses[:3]],
  }


def first_layers(model) -> int:
  """Returns how many decoder layers the device's memory is tried with first."""
  layer, head = models.decoder_sizes(model)
  free = timing.memory_limit() - ACTIVATIONS - PARAMETER_BYTES * 2 * head
  return max(1, min(model.language.layers, int(free / (PARAMETER_BYTES * layer))))


def sft(settings):
  """Yields the SFT step with as many layers as fit: projector and decoder learn."""
  c = make_config(settings, "llava15_7b")
  layers = 2 if settings["tiny"] else first_layers(models.architecture(c, tiny=False))
  while layers > 0:
    what = f"7B widths, {layers} layers, rows of 2 examples"
    try:
      model = models.architecture(c, settings["tiny"], layers)
      yield {"what": what} | measure(c, model, settings, again=True)
      return
    except Exception as error:
      if not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
        raise
      yield {"what": what} | timing.problem(error)
    layers -= FEWER


def lora(settings):
  """Yields the SFT step of the whole 7B model with adapters of rank 128."""
  c = make_config(settings, "llava15_7b")
  c.train.projector = False
  c.lora.rank, c.lora.alpha = (4 if settings["tiny"] else 128), 256.0
  for count in (8, 4):
    try:
      model = models.architecture(c, settings["tiny"])
      yield {"what": f"whole model, LoRA, {count} rows"} | measure(c, model, settings, count)
      return
    except Exception as error:
      if not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
        raise
      yield {"what": f"whole model, LoRA, {count} rows"} | timing.problem(error)


def variants(settings):
  """Yields the SFT step with 8 layers by kernel of attention and by remat."""
  for attention, remat in (
    ("auto", "full"),
    ("tiles", "full"),
    ("auto", "save_weight_matmuls"),
    ("auto", "save_matmuls"),
  ):
    c = make_config(settings, "llava15_7b")
    c.model.attention, c.model.remat = attention, remat
    what = f"attention={attention}, remat={remat}"
    try:
      model = models.architecture(c, settings["tiny"], 2 if settings["tiny"] else 8)
      yield {"what": what} | measure(c, model, settings)
    except Exception as error:  # each may fail in its own manner
      yield {"what": what} | timing.problem(error)


def dpo(settings):
  """Yields pairs a second with a shared prompt and with two sequences, 8 layers, all trained."""
  import separate

  pairs, prompt, answer = (2, 8, 8) if settings["tiny"] else (16, 128, 160)
  c = make_config(settings, "llava15_7b", dpo_presets)
  c.dpo.reference = "step"
  model = models.architecture(c, settings["tiny"], 2 if settings["tiny"] else 8)
  mesh = meshes.make_mesh(c.mesh)
  both = models.pair_rows(model, mesh, pairs, prompt, answer)
  for shared, rows in zip((True, False), both, strict=True):
    program = separate.make_program("dpo", c, model, mesh, pairs, shared=shared)
    step, compiling, total = compile_step(program, rows)
    state, frozen, reference = models.initial(program, c)
    took, losses = time_steps(step, state, frozen, rows, reference)
    del state, frozen, reference
    yield {
      "what": "shared prompts" if shared else "two sequences a pair",
      "pairs_per_s": pairs / took,
      "step_s": took,
      "row": rows["tokens"].shape,
      "compile_s": compiling,
      "planned_GiB": total,
      "losses": [round(loss, 4) for loss in losses[:3]],
    }


def profile(settings):
  """Yields the kernels of two SFT steps that take longest, from a trace that is kept."""
  c = make_config(settings, "llava15_7b")
  model = models.architecture(c, settings["tiny"], 2 if settings["tiny"] else 8)
  mesh = meshes.make_mesh(c.mesh)
  program = sft_steps.make_program(c, model, mesh, 1000)
  rows = models.packed_rows(model, mesh, *sizes(settings))
  step, _, _ = compile_step(program, rows)
  state, frozen, reference = models.initial(program, c)
  state, _ = step(state, frozen, rows, reference)
  jax.block_until_ready(state)
  with jax.profiler.trace(settings["profile"]):
    for _ in range(2):
      state, metrics = step(state, frozen, rows, reference)
    jax.block_until_ready((state, metrics))
  with open(f"{settings['profile']}/sft_step.hlo.txt", "w", encoding="utf-8") as file:
    file.write(step.as_text())
  yield from traces.longest(settings["profile"], steps=2)
