"""Preference runs' batches: lists of mixed length, packed, against the records' own words."""

import pickle

import numpy as np
import pytest

from scripts import check_data
from tests import sft_run, tiny_models
from tests.bad_inputs.failing import fails
from vlalign_jax import stages
from vlalign_jax.data.encode import Example
from vlalign_jax.data.rows import answer_places, build_row
from vlalign_jax.input_pipeline import preferences
from vlalign_jax.weights import source

WORDS = ["red", "no, it is a picture", "green", "blue or so", "a cat", "red and green"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  directory = tmp_path_factory.mktemp("model")
  tiny_models.make_llava(str(directory))
  return directory


@pytest.fixture
def records(tmp_path):
  """Sixteen records with 2 to 5 answers; some text only, some of two turns or two pictures."""
  records = sft_run.make_records(str(tmp_path), 16)
  for index, record in enumerate(records):
    ranked = [WORDS[(index + rank) % 6] for rank in range(2 + index % 4)]
    record["conversations"][-1]["value"] = ranked
  return records


def make_config(model, train, stage="reward", **overrides):
  config = stages.defaults(stage)
  settings = {"model.init_from": str(model), "data.train": train, "data.max_length": 640}
  for key, value in (settings | {"batch_size": 8, "num_train_epochs": 1.0} | overrides).items():
    group, _, name = key.rpartition(".")
    (config[group] if group else config)[name] = value
  return config


def prepare(model, directory, records, row_multiple=1, **overrides):
  """(records, what prepare_train makes of them, tokenizer)."""
  path = sft_run.write_json(directory / "train.json", records)
  config = make_config(model, path, **overrides)
  opened = source.open_source(config.model)
  found, _ = preferences.load_records(config)
  return found.records, preferences.prepare_train(config, opened, found, row_multiple), opened


def answers_in(batch, row, segment, tokenizer):
  """The texts of the answers that a batch says a segment has, their end token included."""
  texts = []
  inside = batch["segments"][row] == segment + 1
  places = batch["answers"][row, segment]
  for rank, place in enumerate(places[places >= 0], start=1):
    mine = np.flatnonzero(inside & (batch["branches"][row] == rank))
    assert mine[-1] == place
    assert batch["loss_mask"][row, mine].tolist() == [1] * (len(mine) - 1) + [0]
    learnt = batch["targets"][row, mine[:-1]]
    np.testing.assert_array_equal(learnt, batch["tokens"][row, mine[1:]])
    texts.append(tokenizer.decode(learnt))
  assert np.all(places[len(texts) :] == -1)
  assert batch["branches"][row, inside].max() == len(texts)
  return texts


@pytest.mark.parametrize("pack", [True, False])
def test_batches_hold_every_answer_once(model, tmp_path, records, pack):
  found, prepared, opened = prepare(
    model, tmp_path, records, 2, **{"data.pack": pack, "num_train_epochs": 2.0, "batch_size": 16}
  )
  assert prepared.max_answers == 5
  assert (prepared.max_segments > 1) == pack
  eos = opened.tokenizer.eos_token
  seen = []
  with prepared.batches() as batches:
    for batch in batches:
      rows, length = batch["tokens"].shape
      assert batch["answers"].shape == (rows, prepared.max_segments, 5)
      assert batch["examples"].shape == (rows, prepared.max_segments)
      assert batch["answers"].dtype == batch["examples"].dtype == np.int32
      for row in range(rows):
        present = int(batch["segments"][row].max())
        assert np.all(batch["examples"][row, present:] == -1)
        assert np.all(batch["answers"][row, present:] == -1)
        for segment in range(present):
          number = int(batch["examples"][row, segment])
          seen.append(number)
          expected = [f" {answer}{eos}" for answer in found[number].answers]
          assert answers_in(batch, row, segment, opened.tokenizer) == expected
          inside = batch["segments"][row] == segment + 1
          pictures = np.sum(inside & (batch["image_slots"][row] >= 0))
          patches = opened.config.tokens_per_image
          assert pictures == patches * len(found[number].images)  # once, whatever K
  assert sorted(seen) == sorted([*range(16)] * 2)


def test_two_hosts_make_the_batches_of_one(model, tmp_path, records):
  _, prepared, _ = prepare(model, tmp_path, records, 2, batch_size=16, num_train_epochs=2.0)
  with (
    prepared.batches() as whole,
    prepared.batches(blocks=(0,), block_count=2) as first,
    prepared.batches(blocks=(1,), block_count=2) as second,
  ):
    for batch, *halves in zip(whole, first, second, strict=True):
      for name, value in batch.items():
        joined = np.concatenate([half[name] for half in halves])
        np.testing.assert_array_equal(joined, value, err_msg=name)


def test_a_picture_that_cannot_be_read_is_skipped(model, tmp_path, records):
  (tmp_path / "002.png").write_bytes(b"no picture")
  _, prepared, _ = prepare(model, tmp_path, records, batch_size=16)
  with prepared.batches(on_bad_record="skip") as batches:
    (batch,) = batches
  assert batch["skipped"].sum() == 1
  assert batch["answers"].shape[1:] == (prepared.max_segments, 5)
  numbers = batch["examples"][batch["examples"] >= 0]
  assert sorted(numbers) == [number for number in range(16) if number != 2]
  np.testing.assert_array_equal((batch["examples"] >= 0).sum(1), batch["segments"].max(1))
  np.testing.assert_array_equal(batch["answers"][..., 0] >= 0, batch["examples"] >= 0)


def test_what_is_left_out_is_counted_in_the_log(model, tmp_path, records, caplog):
  records[0]["conversations"][-1]["value"] = ["red", "red ", "", "blue"]
  records[1]["conversations"][-1]["value"] = ["red", "very long " * 300, "blue"]
  records[2]["conversations"][-1]["value"] = ["red", "red"]
  records[3]["conversations"][0]["value"] = "<image>" + "very long " * 300
  caplog.set_level("INFO")
  found, prepared, _ = prepare(model, tmp_path, records)
  assert prepared.records == 14
  sizes = [len(record.answers) for record in found]
  kept = sum(sizes) - sum(sizes[2:4]) - 3
  assert (
    "data.train: 16 records; 2 skipped, fewer than two of their answers are left;"
    f" {kept} answers of the others, at most 5 of one; left out: 2 answers equal to a better one,"
    f" 1 empty, {1 + sizes[3]} that do not fit data.max_length=640"
  ) in caplog.text


def test_the_longest_list_that_is_shown_sets_the_shape(model, tmp_path, records):
  records[3]["conversations"][-1]["value"] = list("abcdefgh")
  assert prepare(model, tmp_path, records)[1].max_answers == 8
  first = {"max_steps": 1, "data.shuffle": False, "batch_size": 3}
  assert prepare(model, tmp_path, records, **first)[1].max_answers == 4


def test_evaluation_shows_every_record_once(model, tmp_path, records):
  path = sft_run.write_json(tmp_path / "eval.json", records)
  config = make_config(model, path, "dpo", **{"data.eval": path})
  _, evaluation = preferences.load_records(config)
  prepared = preferences.prepare_eval(config, source.open_source(config.model), evaluation, 1)
  with prepared.batches() as batches:
    numbers = np.concatenate([batch["examples"].reshape(-1) for batch in batches])
  assert sorted(numbers[numbers >= 0]) == list(range(16))
  in_a_worker = pickle.loads(pickle.dumps(prepared.load_example))
  np.testing.assert_array_equal(in_a_worker(6).tokens, prepared.load_example(6).tokens)
  assert preferences.prepare_eval(config, None, (), 1) is None


def test_nothing_to_learn(model, tmp_path, records):
  expected = "data.train: no record that is shown has two different answers that fit"
  fails(
    [f"{expected} data.max_length=32; raise it"],
    prepare,
    model,
    tmp_path,
    records,
    **{"data.max_length": 32},
  )


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_check_data(model, tmp_path, records, stage, capsys):
  records[5]["conversations"][-1]["value"] = "red"
  records[6]["conversations"][-1]["value"] = ["red", 5]
  records[8]["conversations"][-1]["value"] = list("abcdefghi")
  path = sft_run.write_json(tmp_path / "train.json", records[4:])
  (found,) = check_data.check_data(make_config(model, path, stage), show=1)
  assert found.files == {path: (12, 3)}
  printed = capsys.readouterr().out
  for line in (
    "record 1 ",
    "one answer only",
    "record 2 ",
    "is a number; give text",
    "record 4 ",
    "9 answers, data.max_candidates is 8",
  ):
    assert line in printed
  assert "9 records; 0 skipped, fewer than two of their answers are left" in printed
  end = tiny_models.make_tokenizer().eos_token
  assert (
    f"USER: Name a color: green ASSISTANT:\n1: « a cat{end}»\n2: « red and green{end}»" in printed
  )


def test_answer_places_written_out():
  def example(*sizes):
    ends = 1 + np.cumsum(sizes)
    length = int(ends[-1]) + 1
    zeros = np.zeros(length, np.int32)
    return Example(zeros, zeros, zeros, zeros, zeros, (), "", ends.astype(np.int32))

  found = answer_places([example(2, 3), example(1, 1, 1)], [7, 4], 3, 4)
  assert found["answers"].tolist() == [[3, 6, -1, -1], [9, 10, 11, -1], [-1] * 4]
  assert found["examples"].tolist() == [7, 4, -1]
  empty = answer_places([], [], 2, 2)
  assert empty["answers"].tolist() == [[-1, -1], [-1, -1]]
  assert empty["examples"].tolist() == [-1, -1]


def test_an_image_twice_in_an_answer_is_refused():
  def example(tokens, branches):
    tokens = np.array(tokens, np.int32)
    branches = np.array(branches, np.int32)
    zeros = np.zeros_like(tokens)
    return Example(tokens, zeros, branches, zeros, zeros, ("a.jpg",), "record 3")

  row, _ = build_row([example([9, 1, 9, 9, 2, 9, 3], [0, 0, 0, 1, 1, 2, 2])], 7, 1, 9, 3)
  assert row["image_slots"].tolist() == [0, -1, 1, 2, -1, 2, -1]
  with pytest.raises(ValueError, match="record 3: 3 image tokens for 1 images of 3 tokens"):
    build_row([example([9, 1, 9, 9, 9], [0, 0, 0, 1, 1])], 5, 1, 9, 3)
