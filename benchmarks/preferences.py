"""Work and time of a DPO step and a reward step, with shared prompts and without.

  python benchmarks/preferences.py [--rounds=5] [--no-flops | --no-time]

An example is an image of 576 tokens, a prompt of 64 and answers of 64: two for DPO, four for the
reward model. The usual way runs each answer behind a prompt and an image of its own; ours runs
image and prompt once. Both are the step of training (policy and reference, backward, AdamW), with
the vision tower frozen.
  operations  of LLaVA-1.5 7B, from the program that the compiler makes of the step for this CPU,
              its loops counted as often as they run; nothing of that size is allocated. Beside it
              the compiler's own total, in which the body of a loop counts once.
  seconds     of a model of about 60M parameters in float32 on this CPU; both ways take turns.
Ends with exit code 1 if ours does more than 0.6 (DPO) or 0.38 (reward) times the operations.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import separate

from vlalign_jax import trees
from vlalign_jax.data import rows as layouts
from vlalign_jax.data.encode import Example
from vlalign_jax.hlo import loops
from vlalign_jax.hlo import operations as compiled_operations
from vlalign_jax.hlo.parser import parse
from vlalign_jax.models import clip, llama, projector, rope, tiles, vlm
from vlalign_jax.optim import optimizer
from vlalign_jax.sharding import hosts
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.stages import defaults, dpo
from vlalign_jax.weights import published

IMAGE, PROMPT, ANSWER = 576, 64, 64
EXAMPLES = 2
# Stage -> (answers of an example, the most of the usual way's operations that ours may take).
STAGES = {"dpo": (2, 0.6), "reward": (4, 0.38)}
SMALL = vlm.ModelConfig(
  vision=clip.VisionConfig(256, 1024, 5, 4, 336, 14, "quick_gelu", 1e-5, (5,), False),
  projector=projector.ProjectorConfig("mlp", 256, 512),
  language=llama.LanguageConfig(32000, 512, 1376, 8, 8, 8, 64, 1e-5, rope.RopeConfig()),
  image_token_id=31999,
  image_mean=(0.5,) * 3,
  image_std=(0.25,) * 3,
)


def make_examples(model: vlm.ModelConfig, K: int) -> tuple[list[Example], list[Example]]:
  """(examples of K answers with a shared prompt, examples of one plain sequence an answer)."""
  rng = np.random.default_rng(0)
  shared, separate = [], []
  for number in range(EXAMPLES):
    text = rng.integers(5, model.image_token_id, PROMPT + K * ANSWER).astype(np.int32)
    trunk = np.concatenate([np.full(IMAGE, model.image_token_id, np.int32), text[:PROMPT]])
    given = text[PROMPT:].reshape(K, ANSWER)
    before = len(trunk) - 1
    parts = [trunk[:-1], *(np.append(trunk[-1:], answer) for answer in given)]
    branches = np.repeat(np.arange(K + 1), [len(part) for part in parts]).astype(np.int32)
    positions = [np.arange(before), *[before + np.arange(1 + ANSWER)] * K]
    ends = before + (1 + ANSWER) * np.arange(1, K + 1) - 1
    shared.append(_example(np.concatenate(parts), positions, branches, ends, number))
    for answer in given:
      tokens = np.concatenate([trunk, answer])
      positions = [np.arange(len(tokens))]
      branches = np.repeat(np.int32([0, 1]), [before, 1 + ANSWER])
      separate.append(_example(tokens, positions, branches, [len(tokens) - 1], number))
  return shared, separate


def _example(tokens, positions, branches, ends, number: int) -> Example:
  """All of a branch but its last token is learned."""
  weights = branches > 0
  weights[ends] = False
  return Example(
    tokens=tokens,
    positions=np.concatenate(positions).astype(np.int32),
    branches=branches,
    targets=np.where(weights, np.roll(tokens, -1), 0).astype(np.int32),
    loss_mask=weights.astype(np.float32),
    images=(str(number),),
    where="drawn at random",
    answers=np.array(ends, np.int32),
  )


def make_rows(model: vlm.ModelConfig, examples: list[Example]) -> dict[str, np.ndarray]:
  """One example a row, with its picture."""
  K, size = len(examples[0].answers), model.vision.image_size
  pictures = np.random.default_rng(1).integers(0, 256, (EXAMPLES, 1, size, size, 3), np.uint8)
  rows = [
    layouts.build_row(
      [example], len(example.tokens), 1, model.image_token_id, model.tokens_per_image
    )[0]
    | layouts.answer_places([example], [number], 1, K)
    for number, example in enumerate(examples)
  ]
  stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  shown = [int(example.images[0]) for example in examples]
  return stacked | {"images": pictures[shown]}


def make_config(stage: str):
  """The stage's defaults in float32, the reference in the step."""
  c = defaults(stage)
  c.batch_size = EXAMPLES
  c.model.dtype, c.model.param_dtype = "float32", "float32"
  c.model.architecture = "llava15_7b"
  if stage == "dpo":
    c.dpo.reference = dpo.IN_STEP
  return c


def with_head(stage: str, model: vlm.ModelConfig) -> vlm.ModelConfig:
  """The architecture with the head that the stage trains."""
  return model if stage == "dpo" else dataclasses.replace(model, head=vlm.SCORE)


def operations(stage: str, rows, *, shared: bool) -> tuple[float, float]:
  """(operations of a step of LLaVA-1.5 7B, the compiler's total with loops counted once)."""
  c = make_config(stage)
  model = with_head(stage, published.published(c.model))
  mesh = meshes.make_mesh(c.mesh)
  program = separate.make_program(stage, c, model, mesh, EXAMPLES, shared=shared)
  shapes = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=meshes.batch_sharding(mesh))
    for name, x in rows.items()
  }
  done = program.train_step.lower(
    program.state, program.frozen, shapes, program.reference
  ).compile()
  learned = int(np.sum(rows["loss_mask"] != 0))
  key_tiles = -(-rows["tokens"].shape[1] // tiles.CPU_TILE)
  assert key_tiles % 2, "the mean over tiles of queries would be rounded"
  trips = loops.Trips(
    to_unknown=-(-learned // meshes.head_chunk(mesh)),  # the output head's
    from_unknown=(key_tiles + 1) // 2,  # attention's, over the keys up to a tile of queries
  )
  counted_once = done.cost_analysis()["flops"]
  return compiled_operations.flops(parse(done.as_text()), trips), counted_once


def steps(stage: str, rows, *, shared: bool):
  """Yields the loss of step after step of the small model."""
  c, model = make_config(stage), with_head(stage, SMALL)
  mesh = meshes.make_mesh(c.mesh)
  program = separate.make_program(stage, c, model, mesh, EXAMPLES, shared=shared)
  params = jax.jit(lambda key: vlm.init_params(model, key)[1])(jax.random.key(0))
  params, frozen = trees.split(params, functools.partial(optimizer.is_trained, config=c))
  reference = None if program.reference is None else jax.tree.map(jnp.copy, params)
  state = program.init_state(params)
  rows = hosts.to_device(mesh, rows)
  while True:
    state, metrics = program.train_step(state, frozen, rows, reference)
    yield float(metrics["loss"])


def seconds(stage: str, rows_of: dict, rounds: int) -> dict[str, list[float]]:
  """Seconds of each step by way, after one of warm-up; their losses must agree."""
  running = {way: steps(stage, rows, shared=way == "shared") for way, rows in rows_of.items()}
  took = {way: [] for way in running}
  for turn in range(rounds + 1):
    losses = []
    for way, run in running.items():
      start = time.perf_counter()
      losses.append(next(run))
      if turn:
        took[way].append(time.perf_counter() - start)
    if not np.isclose(*losses, rtol=1e-3):
      raise SystemExit(f"{stage}, step {turn + 1}: the losses are {losses}")
  return took


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--rounds", type=int, default=5)
  only = parser.add_mutually_exclusive_group()
  only.add_argument("--no-flops", action="store_true")
  only.add_argument("--no-time", action="store_true")
  arguments = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  too_much = []
  for stage, (K, limit) in STAGES.items():
    shared, separate = make_examples(SMALL, K)
    title = f"{stage}, {K} answers of {ANSWER} to {IMAGE} + {PROMPT}"
    rows_of = {"shared": make_rows(SMALL, shared), "separate": make_rows(SMALL, separate)}
    tokens = [rows["tokens"].size // EXAMPLES for rows in rows_of.values()]
    print(f"{title}: {tokens[0]} tokens for {tokens[1]}, {tokens[0] / tokens[1]:.3f} x", flush=True)
    if not arguments.no_flops:
      (ours, ours_once), (usual, usual_once) = (
        operations(stage, rows, shared=way == "shared") for way, rows in rows_of.items()
      )
      print(
        f"  operations {ours / EXAMPLES:.3e} for {usual / EXAMPLES:.3e} an example, "
        f"{ours / usual:.3f} x (at most {limit}), {ours_once / usual_once:.3f} x counted once",
        flush=True,
      )
      if ours / usual > limit:
        too_much.append(f"{title}: {ours / usual:.3f} x the operations, more than {limit}")
    if not arguments.no_time:
      took = seconds(stage, rows_of, arguments.rounds)
      medians = [statistics.median(took[way]) for way in rows_of]
      ratio = statistics.median(a / b for a, b in zip(*took.values(), strict=True))
      print(
        f"  seconds    {medians[0]:.2f} for {medians[1]:.2f} a step of {EXAMPLES}, {ratio:.3f} x",
        flush=True,
      )
  if too_much:
    sys.exit("\n".join(too_much))


if __name__ == "__main__":
  main()
