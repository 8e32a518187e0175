"""One SFT step of ours against transformers' (torch) on the CPU: same weights, batches, optimizer.

  python benchmarks/sft.py [--turns=12] [--batch=8] [--load=full]

A LLaVA of about 60M parameters in float32, its vision tower frozen, AdamW and clipping on both
sides, both on all cores. The two run in processes of their own and take turns step by step, so that
the machine's mood hits both. Two loads:
  full     sequences of one length, every position learned (image positions too): nothing to save
  answers  lengths as in ScienceQA conversations, only answers learned; torch pads to the longest of
           the batch, ours packs
A turn in which a side compiles, or does its first step, is printed and not measured.
Needs requirements-dev.txt.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

IMAGE_SIZE, PATCH, IMAGE_TOKEN, VOCABULARY = 168, 14, 31999, 32000
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2
FULL_LENGTH = 256
LEARNING_RATE, BETAS, EPSILON, CLIP = 2e-5, (0.9, 0.95), 1e-8, 1.0

# Text tokens of prompt (template included) and answer of 64 ScienceQA training records.
LENGTHS = (
  (87, 10), (87, 9), (89, 9), (187, 22), (262, 21), (75, 8), (88, 9), (262, 21), (237, 14), (84, 8),
  (115, 10), (85, 8), (109, 8), (124, 10), (169, 18), (186, 22), (77, 9), (186, 22), (89, 8),
  (177, 22), (262, 21), (158, 17), (124, 10), (160, 10), (135, 23), (106, 8), (254, 20), (169, 18),
  (169, 18), (89, 10), (76, 9), (93, 10), (189, 22), (89, 9), (262, 21), (124, 10), (169, 22),
  (124, 10), (108, 9), (74, 9), (189, 22), (86, 9), (262, 21), (177, 22), (106, 8), (112, 8),
  (211, 10), (108, 8), (86, 9), (98, 8), (124, 10), (186, 22), (270, 22), (124, 10), (205, 10),
  (124, 17), (107, 8), (90, 9), (186, 22), (262, 21), (187, 22), (262, 21), (204, 10), (177, 22),
)  # fmt: skip


def make_examples(load: str, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """(tokens int32[N], learned bool[N]) of each example: an image, then text."""
  rng = np.random.default_rng(seed)
  examples = []
  for prompt, answer in LENGTHS:
    if load == "full":
      prompt, answer = 0, FULL_LENGTH - IMAGE_TOKENS
    text = rng.integers(5, 31000, prompt + answer)
    tokens = np.concatenate([np.full(IMAGE_TOKENS, IMAGE_TOKEN), text]).astype(np.int32)
    learned = np.arange(len(tokens)) >= len(tokens) - answer
    examples.append((tokens, learned if load == "answers" else np.ones_like(learned)))
  return examples


def pictures(number: int) -> np.ndarray:
  """uint8[number, H, W, 3]"""
  return np.random.default_rng(1).integers(
    0, 256, (number, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8
  )


def make_model(directory: str) -> None:
  """Writes the torch model's random weights."""
  import torch
  from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

  torch.manual_seed(0)
  config = LlavaConfig(
    vision_config=CLIPVisionConfig(
      hidden_size=256,
      intermediate_size=1024,
      num_hidden_layers=5,
      num_attention_heads=4,
      image_size=IMAGE_SIZE,
      patch_size=PATCH,
    ),
    text_config=LlamaConfig(
      vocab_size=VOCABULARY,
      hidden_size=512,
      intermediate_size=1376,
      num_hidden_layers=8,
      num_attention_heads=8,
    ),
    image_token_index=IMAGE_TOKEN,
    image_seq_length=IMAGE_TOKENS,
  )
  LlavaForConditionalGeneration(config).save_pretrained(directory)


def torch_steps(directory: str, load: str, batch: int):
  """Yields (loss, whether the step is the first one) of step after step."""
  import torch
  from transformers import LlavaForConditionalGeneration

  torch.set_num_threads(os.cpu_count())
  model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
  model.model.vision_tower.requires_grad_(False)
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, LEARNING_RATE, BETAS, EPSILON, weight_decay=0.0)
  mean, std = (torch.tensor(x)[:, None, None] for x in normalization())
  examples, pixels = make_examples(load, 0), pictures(batch)
  pixels = (torch.tensor(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
  model.train()
  is_first = True
  while True:
    for start in range(0, len(examples), batch):
      part = examples[start : start + batch]
      longest = max(len(tokens) for tokens, _ in part)
      tokens = torch.zeros((len(part), longest), dtype=torch.long)
      labels = torch.full((len(part), longest), -100, dtype=torch.long)
      mask = torch.zeros((len(part), longest), dtype=torch.long)
      for row, (ids, learned) in enumerate(part):
        ids = torch.tensor(ids, dtype=torch.long)
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
        labels[row, : len(ids)] = torch.where(torch.tensor(learned), ids, -100)
      # Without padding, torch's fused causal attention needs no mask: the faster of its ways.
      padded = bool((mask == 0).any())
      out = model(
        input_ids=tokens,
        attention_mask=mask if padded else None,
        pixel_values=pixels,
        labels=labels,
        use_cache=False,
      )
      out.loss.backward()
      torch.nn.utils.clip_grad_norm_(trained, CLIP)
      optimizer.step()
      optimizer.zero_grad(set_to_none=True)
      yield float(out.loss.detach()), is_first
      is_first = False


def normalization():
  """CLIP's mean and standard deviation."""
  return (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def our_steps(directory: str, load: str, batch: int):
  """Yields (loss, whether it compiled) of step after step: the step of scripts/train_sft.py."""
  import functools

  from configs import sft as preset
  from vlalign_jax import trees
  from vlalign_jax.data.encode import Example
  from vlalign_jax.data.plan import ImageSets, plan_batches
  from vlalign_jax.data.plan import statistics as statistics_of
  from vlalign_jax.data.rows import build_row
  from vlalign_jax.models import vlm
  from vlalign_jax.optim import optimizer
  from vlalign_jax.sharding import hosts
  from vlalign_jax.sharding import mesh as meshes
  from vlalign_jax.stages import sft as steps
  from vlalign_jax.weights import hf_config, source, tensors
  from vlalign_jax.weights import load as loading

  c = preset.get_config("demo")
  c.train.vision = False
  c.optim.learning_rate, c.optim.schedule = LEARNING_RATE, "constant"
  vision, projector, language = hf_config.parts_of(hf_config.read_config(directory), directory)
  mean, std = normalization()
  config = vlm.ModelConfig(vision, projector, language, IMAGE_TOKEN, mean, std)
  opened = source.ModelSource(
    config=config,
    hf=None,
    generation=None,
    tokenizer=None,
    images=None,
    layout=None,
    tensors=tensors.find_tensors(directory),
  )
  mesh = meshes.make_mesh(c.mesh)
  program = steps.make_program(c, config, mesh, 1000)
  params = loading.load_params(opened, program.params)
  params, frozen = trees.split(params, functools.partial(optimizer.is_trained, config=c))
  state = program.init_state(params)

  examples = []
  for number, (tokens, learned) in enumerate(make_examples(load, 0)):
    weights = np.append(learned[1:], False)
    examples.append(
      Example(
        tokens=tokens,
        positions=np.arange(len(tokens), dtype=np.int32),
        branches=np.zeros(len(tokens), np.int32),
        targets=np.where(weights, np.roll(tokens, -1), 0).astype(np.int32),
        loss_mask=weights.astype(np.float32),
        images=(str(number % batch),),
        where=f"example {number}",
      )
    )
  lengths = np.array([len(example.tokens) for example in examples], np.int32)
  longest = int(lengths.max())
  plan = plan_batches(
    np.arange(len(examples)),
    lengths,
    ImageSets.from_paths([str(n)] for n in range(len(examples))),
    batch_size=batch,
    max_length=max(longest, 1024 if load == "answers" else FULL_LENGTH),
    row_multiple=1,
    pack=load == "answers",
    max_images_per_row=None,
  )
  print(
    f"rows of a step: {np.unique(plan.row_counts)} x {np.unique(plan.lengths)}, {plan.images} "
    f"images each, {statistics_of(plan)['packing_efficiency']:.1%} of the tokens are real",
    file=sys.stderr,
  )
  pixels = pictures(batch)

  def rows_of(number: int) -> dict[str, np.ndarray]:
    count = int(plan.row_counts[number])
    rows, images = [], np.zeros((count, plan.images, *pixels.shape[1:]), np.uint8)
    for row in range(count):
      part = [examples[example] for example in plan.rows_of(number, row)]
      arrays, names = build_row(
        part, int(plan.lengths[number]), plan.images, IMAGE_TOKEN, IMAGE_TOKENS
      )
      rows.append(arrays)
      for slot, name in enumerate(names):
        images[row, slot] = pixels[int(name)]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]} | {"images": images}

  shapes = set()
  while True:
    for number in range(plan.steps):
      rows = rows_of(number)
      is_new = rows["tokens"].shape not in shapes
      shapes.add(rows["tokens"].shape)
      state, metrics = program.train_step(state, frozen, hosts.to_device(mesh, rows))
      yield float(metrics["loss"]), is_new


def worker(side: str, directory: str, load: str, batch: int) -> None:
  """Does one step for every line on stdin and answers with [seconds, loss, is a warm-up]."""
  steps = (our_steps if side == "ours" else torch_steps)(directory, load, batch)
  print("ready", flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    loss, is_warm_up = next(steps)
    print(json.dumps([time.perf_counter() - start, loss, is_warm_up]), flush=True)


def compare(directory: str, load: str, turns: int, batch: int) -> None:
  """Prints the medians of those of `turns` turns in which no side warms up."""
  sides = {}
  for side in ("ours", "transformers"):
    arguments = [f"--worker={side}", f"--directory={directory}", f"--load={load}"]
    sides[side] = subprocess.Popen(
      [sys.executable, __file__, *arguments, f"--batch={batch}"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    assert sides[side].stdout.readline() == "ready\n", f"{side} did not start"
  seconds, gap = {side: [] for side in sides}, 0.0
  for turn in range(turns):
    told = {}
    for side, process in sides.items():
      process.stdin.write("step\n")
      process.stdin.flush()
      told[side] = json.loads(process.stdout.readline())
    (ours, loss, ours_warms_up), (theirs, their_loss, theirs_warms_up) = told.values()
    is_measured = not (ours_warms_up or theirs_warms_up)
    gap = max(gap, abs(loss - their_loss))
    if is_measured:
      for side, took in zip(seconds, (ours, theirs), strict=True):
        seconds[side].append(took)
    print(
      f"{load:8} turn {turn + 1}/{turns}: {ours:.2f} s, transformers {theirs:.2f} s"
      f"{'' if is_measured else ' (warm-up)'}",
      flush=True,
    )
  for process in sides.values():
    process.stdin.close()
    process.wait()
  medians = {side: statistics.median(times) for side, times in seconds.items()}
  # Every turn has one step of each on the same batch, so ratios are taken turn by turn.
  ratio = statistics.median(
    b / a for a, b in zip(seconds["ours"], seconds["transformers"], strict=True)
  )
  shown = ", ".join(f"{side} {median:.3f} s" for side, median in medians.items())
  print(
    f"{load:8} {shown} a step of {batch}; {ratio:.2f} x (median of {len(seconds['ours'])} turns); "
    f"largest loss gap {gap:.1e}",
    flush=True,
  )


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--turns", type=int, default=12)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--load", choices=("full", "answers"))
  parser.add_argument("--worker", choices=("ours", "transformers"), help=argparse.SUPPRESS)
  parser.add_argument("--directory", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  sys.path.insert(0, root)  # for configs/
  if arguments.worker:
    worker(arguments.worker, arguments.directory, arguments.load, arguments.batch)
    return
  with tempfile.TemporaryDirectory() as directory:
    make_model(directory)
    for load in [arguments.load] if arguments.load else ("full", "answers"):
      compare(directory, load, arguments.turns, arguments.batch)


if __name__ == "__main__":
  main()
