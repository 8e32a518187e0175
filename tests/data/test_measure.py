"""Measures lengths in this process and in worker processes."""

import dataclasses
import os
import signal

import numpy as np
import pytest

from vlalign_jax.data import measure as measuring
from vlalign_jax.data.measure import measure
from vlalign_jax.data.workers import SharedList
from vlalign_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class LoadEncoded:
  """Encodes record r: a token per letter of its text, counts r % 3 and 7, the images it names."""

  texts: SharedList

  def __call__(self, index):
    text = self.texts[index]
    if text == "killer":
      os.kill(os.getpid(), signal.SIGKILL)
    if text == "bad":
      raise InputError(f"train.json, record {index}: no answer")
    return len(text), (index % 3, 7), tuple(word for word in text.split() if word.endswith(".jpg"))


def check(measured):
  assert measured.lengths.dtype == measured.counts.dtype == np.int32
  np.testing.assert_array_equal(measured.lengths, [17, 4, 23])
  np.testing.assert_array_equal(measured.counts, [[0, 7], [1, 7], [2, 7]])
  np.testing.assert_array_equal(measured.images.offsets, [0, 2, 2, 4])
  np.testing.assert_array_equal(measured.images.ids, [0, 1, 2, 0])  # the same path, the same id


TEXTS = ["a.jpg b.jpg a.jpg", "none", "what is c.jpg and a.jpg"]


def test_in_this_process():
  check(measure(LoadEncoded(SharedList(TEXTS)), 3))


def test_in_worker_processes():
  texts = [f"{i}.jpg" for i in range(1203)]
  measured = measure(LoadEncoded(SharedList(texts)), 1203, workers=2, pool_from=1000)
  np.testing.assert_array_equal(measured.lengths, [len(text) for text in texts])
  np.testing.assert_array_equal(measured.counts[:, 0], np.arange(1203) % 3)
  np.testing.assert_array_equal(measured.images.ids, np.arange(1203))
  np.testing.assert_array_equal(measured.images.counts, np.ones(1203))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_record_is_one_clear_line(workers):
  texts = ["good"] * 700 + ["bad"] + ["good"] * 100 + ["bad"]
  with pytest.raises(InputError) as info:
    measure(LoadEncoded(SharedList(texts)), len(texts), workers=workers, pool_from=1)
  assert str(info.value) == "train.json, record 700: no answer"
  assert info.value.__cause__ is None


def test_a_killed_worker_is_one_clear_line():
  texts = ["good"] * 600 + ["killer", "good"]
  with pytest.raises(InputError, match="worker process ended abruptly"):
    measure(LoadEncoded(SharedList(texts)), len(texts), workers=2, pool_from=1)


@pytest.mark.parametrize(
  ("available", "chunks", "started"), [(200, 40, 32), (200, 5, 5), (3, 40, 3), (2, 1, None)]
)
def test_no_more_processes_than_they_get_work(monkeypatch, available, chunks, started):
  asked = []
  start_pool = measuring.start_pool

  def start_one(function, workers):
    asked.append(workers)
    return start_pool(function, 1)

  monkeypatch.setattr(measuring, "start_pool", start_one)
  texts = SharedList(["word"] * (500 * (chunks - 1) + 1))
  measure(LoadEncoded(texts), len(texts), workers=available, pool_from=1)
  assert asked == ([started] if started else [])


def test_no_records():
  measured = measure(LoadEncoded(SharedList([])), 0)
  assert measured.lengths.shape == (0,)
  assert measured.images.offsets.tolist() == [0]
