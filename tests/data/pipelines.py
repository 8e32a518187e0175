"""Runs of the pipeline over made examples, and their batches made token by token."""

import dataclasses
import os
import signal

import numpy as np

from vlalign_jax.data.encode import Example
from vlalign_jax.data.pipeline import Prepared
from vlalign_jax.data.plan import ImageSets, plan_batches
from vlalign_jax.data.workers import SharedList
from vlalign_jax.errors import InputError

IMAGE, PATCHES, SIZE = 7, 2, (2, 3)


@dataclasses.dataclass(frozen=True)
class Load:
  """Makes example e: its images' tokens, then as many text tokens as texts[e]."""

  texts: SharedList
  paths: tuple[tuple[str, ...], ...]
  bad_image: int = -1  # the example whose last image is missing, if any

  def __call__(self, e):
    if self.texts[e] == 13:
      raise InputError(f"train.json, record {e}: no answer")
    if self.texts[e] == 17:
      raise TwoPartError("odd", "text")
    if self.texts[e] == 19:
      os.kill(os.getpid(), signal.SIGKILL)
    tokens = np.array(
      [IMAGE] * (PATCHES * len(self.paths[e])) + [100 + e] * self.texts[e], np.int32
    )
    return Example(
      tokens=tokens,
      positions=np.arange(len(tokens), dtype=np.int32),
      branches=np.zeros(len(tokens), np.int32),
      targets=tokens + 1,
      loss_mask=np.ones(len(tokens), np.float32),
      images=self.paths[e] if e != self.bad_image else (*self.paths[e], "bad.jpg"),
      where=f"train.json, record {e}",
    )


class TwoPartError(Exception):
  """Cannot be unpickled, as its pickle has one argument."""

  def __init__(self, first, second):
    super().__init__(f"{first} {second}")


def load_image(path, size=None):
  if path.startswith("bad"):
    raise InputError(f'image "{path}" not found')
  return np.full((1, *SIZE, 3), int(path), np.uint8)


def make(texts, paths, batch_size=4, row_multiple=2, epochs=1, pack=True):
  """Returns (plan, loader) of a run over these examples."""
  lengths = [text + PATCHES * len(images) for text, images in zip(texts, paths, strict=True)]
  plan = plan_batches(
    np.concatenate([np.random.default_rng(e).permutation(len(texts)) for e in range(epochs)]),
    np.array(lengths, np.int32),
    ImageSets.from_paths(paths),
    batch_size=batch_size,
    max_length=64,
    row_multiple=row_multiple,
    pack=pack,
  )
  return plan, Load(SharedList(texts), tuple(map(tuple, paths)))


def random_run(n=22, **keywords):
  rng = np.random.default_rng(0)
  texts = rng.integers(20, 40, n).tolist()
  paths = [[str(rng.integers(9)) for _ in range(rng.integers(3))] for _ in range(n)]
  return make(texts, paths, **keywords)


def run(plan, load, **keywords):
  return Prepared(plan, load, load_image, IMAGE, PATCHES, SIZE).batches(**keywords)


def expected(plan, load, step):
  """Returns the batch of a step over all hosts, made token by token."""
  rows, length = int(plan.row_counts[step]), plan.lengths[step]
  text = {
    name: np.zeros((rows, length), np.int32)
    for name in ("tokens", "positions", "segments", "branches", "targets", "image_slots")
  }
  text["image_slots"] -= 1
  text["loss_mask"] = np.zeros((rows, length), np.float32)
  images = np.zeros((rows, plan.image_counts[step], *SIZE, 3), np.uint8)
  for row in range(rows):
    at, seen = 0, []
    for segment, e in enumerate(plan.rows_of(step, row), 1):
      example = load(e)
      for position, token in enumerate(example.tokens):
        text["tokens"][row, at] = token
        text["positions"][row, at] = position
        text["segments"][row, at] = segment
        text["targets"][row, at] = token + 1
        text["loss_mask"][row, at] = 1
        if token == IMAGE:
          image, patch = divmod(position, PATCHES)
          path = example.images[image]
          if path not in seen:
            images[row, len(seen)] = int(path)
            seen.append(path)
          text["image_slots"][row, at] = seen.index(path) * PATCHES + patch
        at += 1
  return text | {"images": images, "skipped": np.zeros(rows, np.int32)}


def check(batch, reference):
  assert set(batch) == set(reference)
  for name, value in reference.items():
    assert batch[name].dtype == value.dtype, name
    np.testing.assert_array_equal(batch[name], value, err_msg=name)
