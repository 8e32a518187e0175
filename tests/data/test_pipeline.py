"""The pipeline against rows put together one by one, in threads and in worker processes."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from vlalign_jax.data.encode import Example
from vlalign_jax.data.pipeline import Prepared
from vlalign_jax.data.plan import ImageSets, plan_batches
from vlalign_jax.data.workers import SharedList, StoredList
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
  """Cannot be unpickled, as its pickle holds one argument."""

  def __init__(self, first, second):
    super().__init__(f"{first} {second}")


def load_image(path):
  if path.startswith("bad"):
    raise InputError(f'image "{path}" not found')
  return np.full((*SIZE, 3), int(path), np.uint8)


def make(texts, paths, batch_size=4, row_multiple=2, epochs=1, pack=True):
  """(plan, loader) of a run over these examples."""
  lengths = [text + PATCHES * len(own) for text, own in zip(texts, paths, strict=True)]
  plan = plan_batches(
    np.concatenate([np.random.default_rng(e).permutation(len(texts)) for e in range(epochs)]),
    np.array(lengths, np.int32),
    ImageSets.from_paths(paths),
    batch_size=batch_size,
    max_length=64,
    row_multiple=row_multiple,
    pack=pack,
  )
  return plan, Load(SharedList(texts), tuple(tuple(own) for own in paths))


def random_run(n=22, **keywords):
  rng = np.random.default_rng(0)
  texts = rng.integers(20, 40, n).tolist()
  paths = [[str(rng.integers(9)) for _ in range(rng.integers(3))] for _ in range(n)]
  return make(texts, paths, **keywords)


def run(plan, load, **keywords):
  return Prepared(plan, load, load_image, IMAGE, PATCHES, SIZE).batches(**keywords)


def expected(plan, load, step):
  """The batch of a step over all hosts, token by token."""
  rows, length = int(plan.row_counts[step]), plan.lengths[step]
  text = {
    name: np.zeros((rows, length), np.int32)
    for name in ("tokens", "positions", "segments", "branches", "targets", "image_slots")
  }
  text["image_slots"] -= 1
  text["loss_mask"] = np.zeros((rows, length), np.float32)
  images = np.zeros((rows, plan.images, *SIZE, 3), np.uint8)
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


@pytest.mark.parametrize("pack", [True, False])
def test_two_hosts_make_the_batches_of_one(pack):
  plan, load = random_run(epochs=2, pack=pack)
  with run(plan, load) as one:
    whole = list(one)
  assert len(whole) == plan.steps
  with (
    run(plan, load, blocks=(0,), block_count=2) as first,
    run(plan, load, blocks=(1,), block_count=2) as second,
  ):
    halves = list(zip(first, second, strict=True))
  for step, (batch, both) in enumerate(zip(whole, halves, strict=True)):
    check(batch, expected(plan, load, step))
    check({name: np.concatenate([half[name] for half in both]) for name in batch}, batch)


def test_blocks_that_are_not_neighbours():
  plan, load = random_run(epochs=2, batch_size=16, row_multiple=4)
  assert len(np.unique(plan.row_counts)) > 1
  with run(plan, load, blocks=(3, 0), block_count=4) as pipeline:
    for step, batch in enumerate(pipeline):
      whole = expected(plan, load, step)
      blocks = {name: np.split(value, 4) for name, value in whole.items()}
      check(batch, {name: np.concatenate([value[3], value[0]]) for name, value in blocks.items()})


def test_worker_processes_resume_and_hand_an_input_error_over_at_its_step():
  plan, load = random_run(epochs=2)
  last = plan.steps - 1
  broken = plan.rows_of(last, 0)[0]  # in the first epoch, too, but the run resumes after that
  load = dataclasses.replace(load, bad_image=int(broken))
  with run(plan, load, workers=2, prefetch=1, on_bad_record="skip") as pipeline:
    for _ in range(last - 2):
      next(pipeline)
    state = json.loads(json.dumps(pipeline.get_state()))
  with pytest.raises(ValueError, match="closed"):
    next(pipeline)
  sound = dataclasses.replace(load, bad_image=-1)
  with run(plan, load, workers=1) as pipeline:
    pipeline.set_state(state)
    check(next(pipeline), expected(plan, sound, last - 2))
    check(next(pipeline), expected(plan, sound, last - 1))
    with pytest.raises(InputError) as info:
      next(pipeline)
  assert str(info.value) == f'train.json, record {broken}: image "bad.jpg" not found'
  assert pipeline.get_state()["step"] == last


def test_worker_processes_skip_and_hand_any_other_error_over(caplog):
  first, second, third = (int(e) for e in np.random.default_rng(0).permutation(3))
  texts = [0, 0, 0]
  texts[first], texts[second], texts[third] = 13, 17, 19  # see Load
  plan, load = make(texts, [[]] * 3, batch_size=1, row_multiple=1)
  with run(plan, load, workers=1, prefetch=1, on_bad_record="skip") as pipeline:
    assert next(pipeline)["skipped"].tolist() == [1]
    assert caplog.messages == [f"Left out of step 1: train.json, record {first}: no answer"]
    with pytest.raises(RuntimeError, match=rf"examples \[{second}\]: TwoPartError: odd") as info:
      next(pipeline)
    assert "raise TwoPartError" in "\n".join(info.value.__notes__)
    with pytest.raises(InputError, match="lack of memory"):
      next(pipeline)


@pytest.mark.parametrize("stop", [0, 1, 5])
def test_resume_is_exact(stop):
  plan, load = random_run(epochs=2)
  with run(plan, load) as pipeline:
    for _ in range(stop):
      next(pipeline)
    state = json.loads(json.dumps(pipeline.get_state()))
    rest = list(pipeline)
  with run(plan, load, threads=1, prefetch=1) as resumed:
    next(resumed)
    resumed.set_state(state)
    again = list(resumed)
  assert len(again) == plan.steps - stop
  for ours, theirs in zip(again, rest, strict=True):
    check(ours, theirs)
  with run(plan, load, start_step=stop) as started:
    check(next(started), rest[0])


def test_resume_on_other_data_is_an_error():
  plan, load = random_run()
  other, _ = random_run(n=23)
  with run(plan, load) as pipeline, run(other, load) as resumed:
    resumed.set_state(pipeline.get_state())  # nothing was learnt yet
    next(pipeline)
    with pytest.raises(InputError, match="first 1 steps had other examples"):
      resumed.set_state(pipeline.get_state())
    resumed.set_state({"step": 0, "examples": 0})
    with pytest.raises(InputError, match="first 99 steps"):
      resumed.set_state({"step": 99, "examples": 0})


def test_a_host_with_rows_that_only_pad():
  plan, load = make([30], [["5"]], batch_size=3, row_multiple=4)
  hosts = [run(plan, load, blocks=(i,), block_count=4, pad_id=3) for i in range(4)]
  parts = []
  for host in hosts:
    with host:
      parts.append(next(host))
  holders = [i for i, part in enumerate(parts) if part["segments"].any()]
  assert len(holders) == 1
  for i, part in enumerate(parts):
    assert part["images"].shape == (1, 1, *SIZE, 3)
    if i not in holders:
      assert (part["tokens"] == 3).all()
      assert (part["image_slots"] == -1).all()
      assert not part["loss_mask"].any()
      assert not part["images"].any()


def test_text_only_data_has_no_image_places():
  plan, load = make([20, 30, 25], [[], [], []])
  with run(plan, load) as pipeline:
    batch = next(pipeline)
  assert plan.images == 0
  assert batch["images"].shape == (plan.rows, 0, *SIZE, 3)


def test_skip_leaves_the_example_out_and_says_so(caplog):
  texts, paths = [10, 13, 11, 12], [["1"], [], ["1", "bad.jpg"], ["2"]]
  plan, load = make(texts, paths, row_multiple=1)
  assert plan.rows == 1
  order = [e for e in plan.rows_of(0, 0) if e in (0, 3)]
  with run(plan, load, on_bad_record="skip") as pipeline:
    batch = next(pipeline)
  good = [load(e) for e in order]
  tokens = np.concatenate([example.tokens for example in good])
  used = len(tokens)
  np.testing.assert_array_equal(batch["tokens"][0, :used], tokens)
  assert not batch["tokens"][0, used:].any()
  assert not batch["loss_mask"][0, used:].any()
  np.testing.assert_array_equal(
    batch["segments"][0, :used], np.repeat([1, 2], [len(example.tokens) for example in good])
  )
  held = [int(example.images[0]) for example in good]
  assert [int(image.max()) for image in batch["images"][0]][: len(held)] == held
  assert batch["skipped"].tolist() == [2]
  assert sorted(caplog.messages) == [
    "Left out of step 1: train.json, record 1: no answer",
    'Left out of step 1: train.json, record 2: image "bad.jpg" not found',
  ]


def test_error_policy_in_threads():
  plan, load = make([10, 13], [[], []])
  with run(plan, load) as pipeline, pytest.raises(InputError) as info:
    next(pipeline)
  assert str(info.value) == "train.json, record 1: no answer"


@pytest.mark.parametrize(
  "change",
  [
    {"block_count": 3},
    {"blocks": (2,), "block_count": 2},
    {"blocks": ()},
    {"on_bad_record": "ignore"},
  ],
)
def test_bad_arguments(change):
  plan, load = random_run()
  with pytest.raises(ValueError, match=r"share|on_bad_record"):
    run(plan, load, **change)


SCRIPT = """
  import multiprocessing, sys, time
  from absl import app
  from tests.data.test_pipeline import random_run, run

  def main(argv):
    plan, load = random_run(epochs=50)
    pipeline = run(plan, load, workers=2)
    next(pipeline)
    print(len(multiprocessing.active_children()), flush=True)
    time.sleep(60)

  if __name__ == "__main__":
    app.run(main)
"""


def test_worker_processes_end_quietly_and_never_outlive_a_killed_parent(tmp_path):
  script = tmp_path / "script.py"
  script.write_text(textwrap.dedent(SCRIPT))
  interrupted, killed = (
    subprocess.Popen(
      [sys.executable, script],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
      start_new_session=True,
    )
    for _ in range(2)
  )
  assert [parent.stdout.readline() for parent in (interrupted, killed)] == ["2\n", "2\n"]
  killed.kill()
  os.killpg(interrupted.pid, signal.SIGINT)  # as Ctrl-C does: to the workers, too
  # Workers inherit the pipes, so these end when the last worker has.
  _, errors = interrupted.communicate(timeout=20)
  assert errors.count("Traceback") == 1
  assert errors.endswith("KeyboardInterrupt\n")
  killed.communicate(timeout=20)


def test_shared_list_reaches_a_reader_as_a_file():
  items = [{"id": i, "text": "é" * i} for i in range(50)]
  shared = SharedList(items)
  stored = pickle.loads(pickle.dumps(shared))
  assert isinstance(stored, StoredList)
  assert len(stored) == len(shared) == 50
  assert list(stored) == items == list(shared)
  assert stored[-1] == items[-1]
  with pytest.raises(IndexError):
    stored[50]
  assert pickle.loads(pickle.dumps(stored))[7] == items[7]
  empty = SharedList([])
  assert list(pickle.loads(pickle.dumps(empty))) == []
