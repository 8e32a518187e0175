"""Answers a second on slots that are refilled, against batches that wait for their longest answer.

  python benchmarks/refill.py [--prompts=256] [--slots=16] [--tokens=128] [--rounds=2]

A random model of 5M parameters answers text prompts of 16 to 48 tokens in float32 on the CPU. One
token in `tokens` / 4 ends an answer, so that lengths are as skewed as real ones: their mean is a
quarter of the limit, and one of 55 reaches it. Three sides take turns:
  refilled    `slots` prompts at a time; a slot whose answer has ended takes the next prompt
  in parts    `slots` prompts at a time, each part until its longest answer ends (ppo.sample_parts)
  at once     all prompts in one batch, with as many times the space for keys and values
Prints answers a second and decode steps. Ends with exit code 1 if tokens differ, log-probabilities
differ by more than 1e-5 of their size, or refilled is not twice as fast as in parts.
"""

import argparse
import collections
import os
import statistics
import sys
import time

import numpy as np

LENGTH, VOCABULARY, SEED = 48, 4096, 7
LEAST = 2.0  # times the answers a second of parts
SIDES = ("refilled", "in parts", "at once")


def make_model():
  """Returns (ModelConfig, params)."""
  import jax

  from vlalign_jax.models.clip import VisionConfig
  from vlalign_jax.models.llama import LanguageConfig
  from vlalign_jax.models.projector import ProjectorConfig
  from vlalign_jax.models.rope import RopeConfig
  from vlalign_jax.models.vlm import ModelConfig, init_params

  width = 256
  config = ModelConfig(
    vision=VisionConfig(32, 64, 2, 4, 28, 14, "quick_gelu", 1e-5, (1,), False),
    projector=ProjectorConfig("mlp", 32, width),
    language=LanguageConfig(VOCABULARY, width, 704, 4, 8, 8, 32, 1e-5, RopeConfig(), False),
    image_token_id=VOCABULARY - 1,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.2, 0.2, 0.2),
  )
  return config, jax.jit(lambda key: init_params(config, key)[1])(jax.random.key(0))


def make_prompts(count: int) -> dict[str, np.ndarray]:
  """Returns a batch of prompts without images."""
  rng = np.random.default_rng(0)
  place = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (count, LENGTH))
  is_token = place < rng.integers(16, LENGTH + 1, (count, 1))
  tokens = rng.integers(5, VOCABULARY - 1, (count, LENGTH))
  return {
    "tokens": np.where(is_token, tokens, 0).astype(np.int32),
    "positions": np.where(is_token, place, 0),
    "segments": is_token.astype(np.int32),
    "image_slots": np.full((count, LENGTH), -1, np.int32),
    "images": np.zeros((count, 0, 28, 28, 3), np.uint8),
  }


def make_sides(count: int, slots: int, new_tokens: int) -> dict:
  """Returns side -> function that answers all prompts: () -> (Generated, decode steps)."""
  import jax

  from vlalign_jax.generation import refill
  from vlalign_jax.generation.decoder import Generated
  from vlalign_jax.generation.generate import make_generate
  from vlalign_jax.generation.sampling import Sampling
  from vlalign_jax.generation.slots import make_slots

  config, params = make_model()
  ends = np.random.default_rng(1).permutation(VOCABULARY - 1)[: 4 * VOCABULARY // new_tokens]
  sampling = Sampling(new_tokens, stop_tokens=tuple(map(int, ends)))
  generate, programs = make_generate(config, sampling), make_slots(config, sampling)
  prompts, streams = jax.device_put((make_prompts(count), np.arange(count, dtype=np.int32)))
  tokens, lengths = jax.device_get(prompts["segments"].sum(1)), (LENGTH,) * slots

  def in_parts(size: int):
    found = []
    for start in range(0, count, size):
      part = jax.tree.map(lambda x, start=start: x[start : start + size], (prompts, streams))
      found.append(jax.device_get(generate(params, *part, SEED)))
    answers = Generated(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))
    return answers, sum(int(part.lengths.max()) for part in found)

  def refilled():
    counts, answers = collections.Counter(), refill.no_answers(count, programs)
    batch = refill.Batch(prompts, streams, {row: row for row in range(count)}, tokens)
    for row, found in refill.answer(programs, params, [batch], lengths, SEED, counts):
      for array, values in zip(answers, found, strict=True):
        array[row] = values
    return answers, counts["steps"]

  functions = (refilled, lambda: in_parts(slots), lambda: in_parts(count))
  return dict(zip(SIDES, functions, strict=True))


def faults_of(found: dict, ratios: dict[str, float]) -> list[str]:
  """Returns what is not as it should be, given side -> Generated and side -> how many times."""
  faults, ours = [], found["refilled"]
  for side in SIDES[1:]:
    if not np.array_equal(ours.tokens, found[side].tokens):
      faults.append(f"refilled and {side} differ in tokens")
    expected = found[side].log_probabilities
    gap = (np.abs(ours.log_probabilities - expected) / np.maximum(np.abs(expected), 1)).max()
    if gap > 1e-5:
      faults.append(f"refilled and {side} differ by {gap:.1e} in log-probabilities")
  if ratios["in parts"] < LEAST:
    faults.append(f"{ratios['in parts']:.2f} x in parts, at least {LEAST} are expected")
  return faults


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--prompts", type=int, default=256)
  parser.add_argument("--slots", type=int, default=16)
  parser.add_argument("--tokens", type=int, default=128, help="the most tokens of an answer")
  parser.add_argument("--rounds", type=int, default=2)
  arguments = parser.parse_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
  sides = make_sides(arguments.prompts, arguments.slots, arguments.tokens)
  found, steps, seconds = {}, {}, collections.defaultdict(list)
  for turn in range(arguments.rounds + 1):  # the first one compiles
    for side, answer in sides.items():
      start = time.perf_counter()
      found[side], steps[side] = answer()
      if turn:
        seconds[side].append(time.perf_counter() - start)
  lengths = found["refilled"].lengths
  print(
    f"{arguments.prompts} answers of {lengths.mean():.1f} tokens on average, {lengths.max()} at "
    f"most, of {arguments.tokens} allowed; {arguments.slots} slots"
  )
  ratios = {
    side: statistics.median(b / a for a, b in zip(seconds["refilled"], seconds[side], strict=True))
    for side in SIDES
  }
  for side in SIDES:
    rate = arguments.prompts / statistics.median(seconds[side])
    rows = arguments.prompts if side == "at once" else arguments.slots
    print(
      f"{side:9} {rate:7.1f} answers/s, {steps[side]:5} decode steps of {rows} rows; "
      f"refilled is {ratios[side]:.2f} x"
    )
  sys.exit("\n".join(faults_of(found, ratios)) or 0)


if __name__ == "__main__":
  main()
