"""Compares the batches of the pipeline, made in threads, with rows made one by one."""

import json

import numpy as np
import pytest

from tests.data.pipelines import SIZE, check, expected, make, random_run, run
from vlalign_jax.errors import InputError


@pytest.mark.parametrize("pack", [True, False])
def test_two_hosts_make_the_batches_of_one(pack):
  plan, load = random_run(epochs=2, pack=pack)
  with run(plan, load) as one:
    full = list(one)
  assert len(full) == plan.steps
  with (
    run(plan, load, blocks=(0,), block_count=2) as first,
    run(plan, load, blocks=(1,), block_count=2) as second,
  ):
    halves = list(zip(first, second, strict=True))
  for step, (batch, both) in enumerate(zip(full, halves, strict=True)):
    check(batch, expected(plan, load, step))
    check({name: np.concatenate([half[name] for half in both]) for name in batch}, batch)


def test_blocks_that_are_not_neighbors():
  plan, load = random_run(epochs=2, batch_size=16, row_multiple=4)
  assert len(np.unique(plan.row_counts)) > 1
  with run(plan, load, blocks=(3, 0), block_count=4) as pipeline:
    for step, batch in enumerate(pipeline):
      full = expected(plan, load, step)
      blocks = {name: np.split(value, 4) for name, value in full.items()}
      check(batch, {name: np.concatenate([value[3], value[0]]) for name, value in blocks.items()})


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
    resumed.set_state(pipeline.get_state())  # nothing was learned yet
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
  shown = [int(example.images[0]) for example in good]
  assert [int(image.max()) for image in batch["images"][0]][: len(shown)] == shown
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
