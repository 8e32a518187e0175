"""Answers as a table of a writer."""

from PIL import Image

from scripts import predict
from tests.writers.recorder import Recorder
from vlalign_jax.data.records import Options, parse_record
from vlalign_jax.prediction import tables
from vlalign_jax.writers import choose


def test_pictures_of_a_record_are_side_by_side(tmp_path):
  Image.new("RGB", (480, 240), "red").save(tmp_path / "wide.png")
  Image.new("RGB", (10, 30), "blue").save(tmp_path / "small.png")
  joined = tables.side_by_side(
    [str(tmp_path / name) for name in ("wide.png", "missing.png", "small.png", "wide.png")]
  )
  assert joined.size == (240 + 10, 120)
  assert joined.getpixel((239, 60)) == (255, 0, 0)
  assert joined.getpixel((245, 10)) == (0, 0, 255)
  assert joined.getpixel((245, 60)) == (255, 255, 255)
  assert tables.side_by_side([str(tmp_path / "missing.png")]) is None


def test_pictures_are_not_decoded_for_writers_without_tables(monkeypatch, tmp_path):
  entry = {"id": "a", "image": "0.png", "conversations": [{"from": "human", "value": "<image>?"}]}
  record, _ = parse_record(entry, "eval.json", 0, "record 0", Options(answers="optional"))
  monkeypatch.setattr(tables, "side_by_side", None)  # cannot be called
  writer = Recorder()
  writer.shows_tables = False
  line = {"record": 0, "id": "a", "images": ["0.png"], "prompt": "?", "answer": "x"}
  tables.write([writer], "t", 0, (record,), [line])
  assert writer.tables == []


def test_a_prediction(models, tmp_path, monkeypatch):
  """It gives its metrics and the records of its gallery to the writers."""
  writer = Recorder()
  monkeypatch.setattr(choose, "_open", lambda *_: writer)
  config = models.config(**{"log.writers": "tensorboard", "gallery": 2})
  lines, _ = predict.predict(config, str(tmp_path))
  ((name, step, rows),) = writer.tables
  assert (name, step) == ("predictions", 0)
  assert [row["record"] for row in rows] == [0, 1]
  for row, line in zip(rows, lines, strict=False):
    assert (row["answer"], row["logprob"]) == (line["answer"], line["logprob"])
    assert (row["picture"] is not None) == bool(line["images"])
    assert row["prompt"].endswith(line["prompt"])
  (numbers,) = writer.lines
  assert numbers["records"] == len({line["record"] for line in lines})
  assert writer.closed == [False]
