"""Generation of ours against transformers' `generate` (torch) on the CPU: same weights and prompts.

  python benchmarks/generation.py [--rounds=5] [--size=tiny]

Answers of 64 tokens to 8 prompts of different lengths, each with an image, greedily and drawn
(temperature 0.75, top-k 50, top-p 0.95), float32, on all cores. Three sides take turns, so that the
machine's mood hits all of them:
  ours            one batch, `generation.generate`
  batched         transformers' `generate`, one left-padded batch
  one at a time   transformers' `generate`, a prompt after the other
Ends with exit code 1 if greedy answers do not agree token for token, or if with the tiny model ours
is not twice as fast as batched and five times as fast as one at a time.
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

PROMPTS, NEW_TOKENS = 8, 64
TEXT_LENGTHS = (20, 35, 28, 60, 44, 31, 52, 25)  # tokens of each prompt besides its image's
SAMPLING = {"temperature": 0.75, "top_k": 50, "top_p": 0.95}
# Side -> how many times faster ours is at least.
LEAST = {"batched": 2, "one at a time": 5}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = {
  # Vision: width, layers, image size, patch size.
  # Language: width, MLP width, layers, heads, vocabulary.
  "tiny": ((64, 2, 56, 14), (128, 352, 4, 4, 4096)),
  "60M": ((256, 5, 168, 14), (512, 1376, 8, 8, 32000)),
}


def image_tokens(size: str) -> int:
  """Positions that an image takes."""
  _, _, image, patch = SIZES[size][0]
  return (image // patch) ** 2


def image_token(size: str) -> int:
  """The id of an image's tokens, the last one."""
  return SIZES[size][1][-1] - 1


def make_prompts(size: str) -> list[np.ndarray]:
  """Token ids int32[S] of each: its image, then text."""
  rng = np.random.default_rng(0)
  vocabulary = SIZES[size][1][-1]
  return [
    np.concatenate(
      [np.full(image_tokens(size), image_token(size)), rng.integers(5, vocabulary - 100, length)]
    ).astype(np.int32)
    for length in TEXT_LENGTHS
  ]


def pictures(size: str) -> np.ndarray:
  """uint8[8, H, W, 3]"""
  side = SIZES[size][0][2]
  return np.random.default_rng(1).integers(0, 256, (PROMPTS, side, side, 3), dtype=np.uint8)


def make_model(directory: str, size: str) -> None:
  """Writes the torch model's random weights."""
  import torch
  from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

  torch.manual_seed(0)
  (v_width, v_layers, image, patch), (width, mlp_width, layers, heads, vocabulary) = SIZES[size]
  config = LlavaConfig(
    vision_config=CLIPVisionConfig(
      hidden_size=v_width,
      intermediate_size=4 * v_width,
      num_hidden_layers=v_layers,
      num_attention_heads=4,
      image_size=image,
      patch_size=patch,
    ),
    text_config=LlamaConfig(
      vocab_size=vocabulary,
      hidden_size=width,
      intermediate_size=mlp_width,
      num_hidden_layers=layers,
      num_attention_heads=heads,
      initializer_range=0.05,
    ),
    image_token_index=image_token(size),
    image_seq_length=image_tokens(size),
  )
  LlavaForConditionalGeneration(config).save_pretrained(directory)


def torch_side(directory: str, size: str, one_at_a_time: bool, model=None, sampling=None):
  """`(drawn) -> int[8, 64]`, with transformers.

  Args:
    directory: of the weights.
    size: a key of SIZES.
    one_at_a_time: whether prompts are answered one after the other.
    model: that answers; None: of the directory.
    sampling: options of `generate` for drawn answers; None: SAMPLING.
  """
  import torch
  from transformers import LlavaForConditionalGeneration

  torch.set_num_threads(os.cpu_count())
  if model is None:
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
  mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
  pixels = (torch.tensor(pictures(size)).permute(0, 3, 1, 2) / 255 - mean) / std
  prompts = make_prompts(size)
  longest = max(map(len, prompts))
  tokens = torch.zeros((PROMPTS, longest), dtype=torch.long)
  mask = torch.zeros((PROMPTS, longest), dtype=torch.long)
  for row, ids in enumerate(prompts):
    tokens[row, longest - len(ids) :] = torch.tensor(ids)
    mask[row, longest - len(ids) :] = 1
  model.generation_config.eos_token_id = None  # all answers have all tokens
  forever = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0}

  def generate(drawn: bool):
    how = {"do_sample": True, **(sampling or SAMPLING)} if drawn else {"do_sample": False}
    if not one_at_a_time:
      found = model.generate(
        input_ids=tokens, attention_mask=mask, pixel_values=pixels, **how, **forever
      )
      return found[:, longest:].numpy()
    parts = []
    for row, ids in enumerate(prompts):
      ids = torch.tensor(ids)[None].long()
      found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels[row : row + 1],
        **how,
        **forever,
      )
      parts.append(found[0, ids.shape[1] :].numpy())
    return np.stack(parts)

  return generate


def open_ours(directory: str, size: str):
  """Returns (ModelSource, rows of prompts of one length as `prepare_prompts` makes them)."""
  from vlalign_jax.data.encode import Example
  from vlalign_jax.data.rows import build_row
  from vlalign_jax.input_pipeline.prompts import row_lengths
  from vlalign_jax.models import vlm
  from vlalign_jax.weights import hf_config, source, tensors

  parts = hf_config.parts_of(hf_config.read_config(directory), directory)
  opened = source.ModelSource(
    config=vlm.ModelConfig(*parts, image_token(size), MEAN, STD),
    hf=None,
    generation=None,
    tokenizer=None,
    images=None,
    layout=None,
    tensors=tensors.find_tensors(directory),
  )
  prompts = make_prompts(size)
  (length,) = row_lengths(np.full(PROMPTS, max(map(len, prompts))))
  rows = []
  for ids in prompts:
    zeros = np.zeros(len(ids), np.int32)
    example = Example(
      ids, np.arange(len(ids), dtype=np.int32), zeros, zeros, zeros * 1.0, ("0",), "a prompt"
    )
    rows.append(build_row([example], length, 1, image_token(size), image_tokens(size))[0])
  rows = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  return opened, rows | {"images": pictures(size)[:, None]}


def our_side(directory: str, size: str):
  """`(drawn) -> int[8, 64]`, with ours."""
  import jax

  from vlalign_jax.generation.generate import make_generate
  from vlalign_jax.generation.sampling import Sampling
  from vlalign_jax.models import vlm
  from vlalign_jax.sharding import mesh as meshes
  from vlalign_jax.stages import defaults
  from vlalign_jax.weights import load

  opened, rows = open_ours(directory, size)
  mesh = meshes.make_mesh(defaults("sft").mesh)
  _, abstract = vlm.abstract_params(opened.config, mesh=mesh)
  place = meshes.replicated(mesh)
  params = load.load_params(opened, meshes.place(abstract, jax.tree.map(lambda _: place, abstract)))
  programs = {
    True: make_generate(opened.config, Sampling(NEW_TOKENS, **SAMPLING), mesh=mesh),
    False: make_generate(opened.config, Sampling(NEW_TOKENS, temperature=0), mesh=mesh),
  }

  def generate(drawn: bool):
    return np.asarray(programs[drawn](params, rows, np.arange(PROMPTS), 0).tokens[:, 0])

  return generate


def worker(side: str, directory: str, size: str) -> None:
  """Generates once for every line on stdin and answers with its seconds and tokens."""
  if side == "ours":
    generate = our_side(directory, size)
  else:
    generate = torch_side(directory, size, side == "one at a time")
  print("ready", flush=True)
  for line in sys.stdin:
    start = time.perf_counter()
    tokens = generate(line.strip() == "drawn")
    print(json.dumps([time.perf_counter() - start, tokens.tolist()]), flush=True)


def compare(directory: str, size: str, rounds: int) -> list[str]:
  """Prints medians over `rounds` turns, after one of warm-up and compiling; says what fails."""
  faults = []
  sides = {}
  for side in ("ours", "batched", "one at a time"):
    sides[side] = subprocess.Popen(
      [sys.executable, __file__, f"--worker={side}", f"--directory={directory}", f"--size={size}"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    assert sides[side].stdout.readline() == "ready\n", f"{side} did not start"
  for how in ("greedy", "drawn"):
    seconds = {side: [] for side in sides}
    for turn in range(rounds + 1):
      tokens = {}
      for side, process in sides.items():
        process.stdin.write(f"{how}\n")
        process.stdin.flush()
        took, tokens[side] = json.loads(process.stdout.readline())
        if turn:
          seconds[side].append(took)
    shown = ", ".join(f"{side} {statistics.median(times):.3f} s" for side, times in seconds.items())
    ratios = {
      side: statistics.median(b / a for a, b in zip(seconds["ours"], seconds[side], strict=True))
      for side in LEAST
    }
    if size == "tiny":
      faults += [
        f"{how}: {ratios[side]:.1f} x {side}, at least {least} are expected"
        for side, least in LEAST.items()
        if ratios[side] < least
      ]
    same = ""
    if how == "greedy":
      equal = np.mean(np.array(tokens["ours"]) == np.array(tokens["one at a time"]))
      same = f"; {equal:.1%} of the tokens are those of one at a time"
      if equal < 1:
        faults.append("greedy answers differ")
    faster = ", ".join(f"{ratio:.1f} x {side}" for side, ratio in ratios.items())
    print(f"{size} {how}: {shown}; ours is {faster}{same}", flush=True)
  for process in sides.values():
    process.stdin.close()
    process.wait()
  return faults


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  parser.add_argument("--directory", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
  if arguments.worker:
    worker(arguments.worker, arguments.directory, arguments.size)
    return
  with tempfile.TemporaryDirectory() as directory:
    make_model(directory, arguments.size)
    faults = compare(directory, arguments.size, arguments.rounds)
  sys.exit("\n".join(faults) or 0)


if __name__ == "__main__":
  main()
