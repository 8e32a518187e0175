"""One SFT step of ours and of transformers on the same card, in turns.

Both hold float32 parameters and moments, compute in bfloat16, and compute layers again in the
backward pass; rows are one example of full length with an image, so that nothing is saved by
packing. Each process has under half of the card, which is why there are few layers.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time

from accelerator_lines import torch_side

TURNS = 6


def sizes(tiny: bool) -> dict:
  """Returns what both sides build their model and batch from, in transformers' names."""
  vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
  vision |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}
  text = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 6}
  text |= {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064}
  rows, length = 4, 2048
  if tiny:
    vision |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    text |= {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 512}
    rows, length = 2, 64
  text["max_position_embeddings"] = 4096
  image_tokens = (vision["image_size"] // vision["patch_size"]) ** 2
  return {
    "vision": vision,
    "text": text,
    "rows": rows,
    "length": length,
    "image_tokens": image_tokens,
  }


def our_steps(sizes: dict, tiny: bool):
  """Yields the loss of step after step, of the step of scripts/train_sft.py."""
  from accelerator_lines import models
  from accelerator_lines.training import make_config
  from vlalign_jax.sharding import mesh as meshes
  from vlalign_jax.stages import sft

  c = make_config({}, "llava15_7b")
  model = models.architecture(c, tiny, sizes["text"]["num_hidden_layers"])
  mesh = meshes.make_mesh(c.mesh)
  program = sft.make_program(c, model, mesh, 1000)
  rows = models.packed_rows(model, mesh, sizes["rows"], sizes["length"], 1)
  state, frozen, _ = models.initial(program, c)
  while True:
    state, metrics = program.train_step(state, frozen, rows)
    yield float(metrics["loss"])


def worker(side: str, tiny: bool) -> None:
  """Does one step for every line on stdin and answers with its seconds, loss and memory."""
  if side == "ours":
    from accelerator_lines.timing import peak_memory

    steps = our_steps(sizes(tiny), tiny)
  else:
    steps, peak_memory = torch_side.steps(sizes(tiny), side), torch_side.peak_memory
  for _ in sys.stdin:
    start = time.perf_counter()
    loss = next(steps)
    took = time.perf_counter() - start
    print("@" + json.dumps([took, loss, peak_memory()]), flush=True)


def start(side: str, tiny: bool):
  """Returns the process of a side; its errors go where this process's go."""
  return subprocess.Popen(
    [sys.executable, "-m", "accelerator_lines.versus", side, "tiny" if tiny else "full"],
    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def ask(process) -> list:
  """Has a side do one step; returns its seconds, loss and memory."""
  process.stdin.write("step\n")
  process.stdin.flush()
  for line in process.stdout:
    if line.startswith("@"):
      return json.loads(line[1:])
  raise RuntimeError("a side ended; see its message above")


def compare(settings):
  """Yields medians of both sides, and the ratio turn by turn."""
  if problem := torch_side.missing():
    yield {"what": "skipped", "error": problem}
    return
  batch = sizes(settings["tiny"])
  tokens = batch["rows"] * batch["length"]
  ways = ["sdpa"] + ["flash_attention_2"] * (importlib.util.find_spec("flash_attn") is not None)
  ours = start("ours", settings["tiny"])
  for way in ways:
    sides = {"ours": ours, way: start(way, settings["tiny"])}
    results = {side: [] for side in sides}
    for turn in range(TURNS + 2):
      for side, process in sides.items():
        result = ask(process)
        if turn > 1:
          results[side].append(result)
    sides[way].kill()
    sides[way].wait()
    for side, kept in results.items():
      took = statistics.median(r[0] for r in kept)
      yield {
        "what": f"{side}, {batch['text']['num_hidden_layers']} layers",
        "step_s": took,
        "tokens_per_s": tokens / took,
        "peak_GiB": kept[-1][2],
        "loss": kept[0][1],
      }
    pairs = zip(results["ours"], results[way], strict=True)
    yield {
      "what": f"ours against transformers, {way}",
      "times_as_fast": statistics.median(b[0] / a[0] for a, b in pairs),
    }
  ours.kill()


if __name__ == "__main__":
  worker(sys.argv[1], sys.argv[2] == "tiny")
