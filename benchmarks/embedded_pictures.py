"""Compares data whose pictures are inside a Parquet file with the same pictures as files.

JAX_PLATFORMS=cpu python -m benchmarks.embedded_pictures --directory=DIR [--rows=20000]

Draws JPEGs of a common size, writes them as files with LLaVA JSON and as one Parquet file, and
reads both, each in a process of its own: loading, a plan, and batches by several threads; the
second time with pictures already copied. Prints seconds, the peak of memory and pictures a second,
and fails if batches or their order differ, a resumed reader differs, or memory exceeds 1 GB.
"""

import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import time

import numpy as np
from absl import app, flags
from PIL import Image

DIRECTORY = flags.DEFINE_string("directory", None, "Where data goes; reused.", required=True)
ROWS = flags.DEFINE_integer("rows", 20_000, "Records, each with a picture of its own.")
STEPS = flags.DEFINE_integer("steps", 60, "Batches of 64 that are read.", lower_bound=2)
PART = flags.DEFINE_string("part", "", "Set by this script in its own processes.")
SIZE = (500, 375)  # as most of COCO, of which LLaVA's pictures are
GROUP = 1000  # rows of a row group
LIMIT = 1.0  # GB


def make(directory: str, rows: int) -> None:
  """Writes pictures/*.jpg, data.json and data.parquet, with the same records."""
  import pyarrow as pa
  import pyarrow.parquet as pq

  os.makedirs(f"{directory}/pictures", exist_ok=True)
  generator, records = np.random.default_rng(0), []
  schema = pa.schema(
    [
      ("id", pa.string()),
      ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
      ("prompt", pa.string()),
      ("completion", pa.string()),
    ]
  )
  with pq.ParquetWriter(f"{directory}/data.parquet.part", schema) as writer:
    for start in range(0, rows, GROUP):
      group = []
      for number in range(start, min(start + GROUP, rows)):
        coarse = generator.integers(0, 255, (SIZE[1] // 12, SIZE[0] // 12, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC).save(file, "JPEG")
        name = f"{number:06d}.jpg"
        with open(f"{directory}/pictures/{name}", "wb") as picture:
          picture.write(file.getvalue())
        messages = [
          {"from": "human", "value": f"<image>\nWhat is picture {number}?"},
          {"from": "gpt", "value": f"Noise number {number}."},
        ]
        records.append({"id": str(number), "image": name, "conversations": messages})
        group.append(
          {
            "id": str(number),
            "images": [{"bytes": file.getvalue(), "path": name}],
            "prompt": messages[0]["value"],
            "completion": messages[1]["value"],
          }
        )
      writer.write_table(pa.Table.from_pylist(group, schema))
  with open(f"{directory}/data.json", "w", encoding="utf-8") as file:
    json.dump(records, file)
  os.replace(f"{directory}/data.parquet.part", f"{directory}/data.parquet")


def read(directory: str, part: str, steps: int) -> dict:
  """Loads one form of the data and reads batches; returns what was measured."""
  import importlib

  from vlalign_jax.input_pipeline import prepare, sft
  from vlalign_jax.weights import source

  c = importlib.import_module("configs.sft").get_config("demo")
  c.model.init_from = f"{directory}/demo/model"
  c.data.train = f"{directory}/data.{part}"
  c.data.images = f"{directory}/pictures" if part == "json" else ""
  c.data.cache = f"{directory}/cache"
  c.batch_size, c.num_train_epochs = 64, 1.0
  opened = source.open_source(c.model)
  before = _peak()
  start = time.perf_counter()
  records, _ = prepare.load_records(sft.TASK, c)
  loaded = time.perf_counter() - start
  train = prepare.prepare_train(sft.TASK, c, opened, records, 1)
  digest = resumed = hashlib.sha256()
  start = time.perf_counter()
  with train.batches(threads=2) as batches:
    for step in range(steps):
      _add(digest, next(batches))
      if step == steps // 2 - 1:
        resumed = digest.copy()
        state = batches.get_state()
  seconds = time.perf_counter() - start
  with train.batches(threads=2) as batches:
    batches.set_state(state)
    for _ in range(steps - steps // 2):
      _add(resumed, next(batches))
  return {
    "load_seconds": loaded,
    "pictures_per_second": steps * 64 / seconds,
    "batches": digest.hexdigest(),
    "resumed_is_equal": resumed.hexdigest() == digest.hexdigest(),
    "peak_gb": _peak(),
    "peak_before_gb": before,
  }


def _add(digest, batch: dict[str, np.ndarray]) -> None:
  for name in sorted(batch):
    digest.update(np.ascontiguousarray(batch[name]).data)


def _peak() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main(_):
  directory = os.path.abspath(DIRECTORY.value)
  if PART.value:
    print(json.dumps(read(directory, PART.value, STEPS.value)))
    return
  if not os.path.exists(f"{directory}/data.parquet"):
    demo = ["scripts/make_demo.py", f"--output={directory}/demo", "--train=50", "--eval=5"]
    subprocess.run([sys.executable, *demo], check=True)
    make(directory, ROWS.value)
  size = os.path.getsize(f"{directory}/data.parquet") / 1e9
  print(f"{ROWS.value:,} records, {size:.2f} GB")
  results, rates = {}, {}
  for name in ("json", "parquet, first time", "json again", "parquet again", "json", "parquet"):
    part = name.split(",")[0].split()[0]
    command = [sys.executable, "-m", "benchmarks.embedded_pictures", f"--directory={directory}"]
    command += [f"--part={part}", f"--steps={STEPS.value}"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    rates.setdefault(part, []).append(result["pictures_per_second"])
    print(
      f"{name:20} load {result['load_seconds']:6.1f} s, peak {result['peak_gb']:.2f} GB"
      f" ({result['peak_before_gb']:.2f} before), {result['pictures_per_second']:,.0f} pictures/s,"
      f" resumed {'equal' if result['resumed_is_equal'] else 'DIFFERENT'}"
    )
    results[name] = result
  assert len({result["batches"] for result in results.values()}) == 1, "the batches differ"
  assert all(result["resumed_is_equal"] for result in results.values()), "resuming changes batches"
  assert all(result["peak_gb"] < LIMIT for result in results.values()), "too much memory"
  ratio = np.median(rates["parquet"]) / np.median(rates["json"])
  print(f"pictures a second, Parquet over files: {ratio:.2f}")


if __name__ == "__main__":
  app.run(main)
