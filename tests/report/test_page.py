"""Tests the report: what is on it, that it needs no other file, and errors of directories."""

import pathlib
import subprocess
import sys

import pytest

from scripts import report
from tests.prediction.test_gallery import EVIL, Page
from tests.report import runs
from vlalign_jax.errors import InputError
from vlalign_jax.report import curves, directory, samples, tables

ROOT = pathlib.Path(__file__).parents[2]
SFT_LINES = [
  {"step": 1, "loss": 3.0, "perf/tokens_per_second": 100.0, "perf/seconds": 5.0, "bad_records": 0},
  {"step": 2, "loss": None, "perf/tokens_per_second": 300.0, "perf/seconds": 8.0, "bad_records": 0}
  | {"eval/loss": 1.25, "eval/exact_match": 0.5},
  {"step": 3, "loss": 1.5, "perf/tokens_per_second": 200.0, "perf/seconds": 75.4, "bad_records": 0}
  | {"eval/loss": 1.75, "eval/exact_match": 0.625, "perf/peak_memory_gb": 7.25},
]


@pytest.fixture
def places(tmp_path):
  """Returns directories of two SFT runs, a PPO run and a prediction."""
  images = tmp_path / "data"
  name = runs.picture(images, "a.png")
  data = str(images / "train.json")
  other = [line | {"loss": 2.5} for line in SFT_LINES]
  root = {"image_root": str(images)}
  rollouts = [
    runs.answer(0, [name], "an old answer", step=1, score=0.5, kl=0.1, **root),
    runs.answer(0, [name], f"new {EVIL}", step=3, score=0.75, kl=0.2, **root),
    runs.answer(1, ["missing.png"], "without", step=3, score=None, kl=0.3, **root),
  ]
  ppo = [{"step": 0, "eval/objective/scores": 1.0}, {"step": 1, "objective/scores": 1.5}]
  answers = [runs.answer(0, [name], "an answer", reference="right", reward=0.125, **root)]
  return [
    str(runs.train(tmp_path / "a" / "sft", "sft", SFT_LINES, data__train=data, seed=7)),
    str(runs.train(tmp_path / "b" / "sft", "sft", other, data__train=data, seed=8)),
    str(runs.train(tmp_path / "ppo", "ppo", ppo, rollouts, data__train=data)),
    str(runs.predict(tmp_path / "answers", answers, {"exact_match": 0.875}, images)),
  ]


@pytest.fixture
def page(places) -> Page:
  """Returns the parsed page of all directories."""
  content = pathlib.Path(report.report(places)).read_text()
  assert "url(" not in content
  assert "@import" not in content
  return Page(content)


def test_it_needs_no_other_file(page, places):
  assert pathlib.Path(places[0], "report.html").is_file()
  assert "script" not in page.tags
  assert page.links
  assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)


def test_titles_and_names(page):
  for text in ("SFT", "PPO", "Predictions", "a/sft", "b/sft", "answers", "exact_match", "0.875"):
    assert text in page.text
  assert "DPO" not in page.text


def test_samples_are_the_newest(page):
  assert f"new {EVIL}" in page.text
  assert "an old answer" not in page.text
  assert "step 3, 2 of 2 records" in page.text
  assert "missing.png" in page.text  # named in place of the picture
  assert "an answer" in page.text
  assert len(page.links) == 2


def test_curves_lie_over_each_other(places):
  content = pathlib.Path(report.report(places[:2])).read_text()
  loss = content.split("<figcaption>loss</figcaption>")[1].split("</figure>")[0]
  labels = [f"{name}/sft, {kind}" for name in "ab" for kind in ("training", "held out")]
  assert all(f"<title>{label}</title>" in loss for label in labels)
  assert "b/sft, held out, step 2: 1.25" in loss
  assert "one value only: bad_records 0" in content


def test_held_out_figures_and_cost(places):
  one, *_ = directory.read_all(places[:1])
  text = Page(tables.held_out([one])).text
  assert "last, step 3" in text
  assert "best, step 2" in text  # the lowest eval/loss
  assert "0.625" in text
  cost = Page(tables.cost([one])).text
  for part in ("200", "1\u00a0min\u00a015\u00a0s", "7.25"):
    assert part in cost


def test_configuration_marks_where_runs_differ(places):
  shown = tables.config(directory.read_all(places[:2]))
  assert "<mark>7</mark>" in shown
  assert "<mark>8</mark>" in shown
  assert "train.json</mark>" not in shown
  assert shown.count("<mark>") == 2
  # A single run has nothing to differ from.
  assert "<mark>" not in tables.config(directory.read_all(places[:1]))


def test_runs_that_record_little(tmp_path):
  """Older runs have no time, and not all runs are evaluated; nine runs have nine colors."""
  lines = [{"step": 1, "loss": 2.0, "grad_norm": None}, {"step": 2, "loss": 1.0}]
  places = [str(runs.train(tmp_path / f"run{n}", "dpo", lines)) for n in range(9)]
  content = pathlib.Path(report.report(places)).read_text()
  assert "nothing was evaluated" in content
  assert "held out: dashed" not in content
  assert "never finite: grad_norm" in content
  assert content.count("grad_norm") == 1
  read = directory.read_all(places)
  assert len({*curves.colors(read).values()}) == 9
  (header, row), *_ = [Page(tables.cost([run])).text.strip().splitlines()[:2] for run in read]
  assert row.startswith("run02--")  # two steps; no rates, time or memory


def test_many_records_are_cut(tmp_path):
  lines = [runs.answer(n, [], f"answer {n}") for n in range(samples.MOST_RECORDS + 3)]
  place = runs.predict(tmp_path / "answers", lines, {}, tmp_path)
  content = pathlib.Path(report.report([str(place)])).read_text()
  assert f"{samples.MOST_RECORDS} of {len(lines)} records" in content
  assert f"answer {samples.MOST_RECORDS - 1}" in content
  assert f"answer {samples.MOST_RECORDS}" not in content


def test_names_are_the_shortest_that_differ():
  names = directory._names(["/runs/a/sft", "/runs/b/sft", "/runs/ppo", "/sft"])
  assert names == ["a/sft", "b/sft", "ppo", "/sft"]


def test_durations():
  assert [tables.duration(s) for s in (41.6, 252, 11100)] == ["42 s", "4 min 12 s", "3 h 05 min"]


def test_bad_directories(tmp_path, places):
  empty = runs.train(tmp_path / "empty", "sft", [])
  damaged = runs.train(tmp_path / "damaged", "sft", SFT_LINES)
  (damaged / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
  unfinished = runs.predict(tmp_path / "unfinished", [], {}, tmp_path)
  (unfinished / "metrics.json").unlink()
  (tmp_path / "model").mkdir()
  (tmp_path / "hub").mkdir()
  (tmp_path / "hub" / "config.json").write_text('{"model_type": "llava"}')
  (tmp_path / "list").mkdir()
  (tmp_path / "list" / "config.json").write_text("[]")
  expected = {
    tmp_path / "missing": "missing is not a directory; name the --workdir",
    tmp_path / "model": "model has no config.json; name the --workdir",
    tmp_path / "hub": "a config of the stage None; name a run of sft, reward, dpo, ppo, or",
    tmp_path / "list": "list/config.json is not a config",
    empty: "empty has no numbers yet; metrics.jsonl is written from the first step on",
    damaged: "damaged/metrics.jsonl, line 2: damaged .*; delete this line",
    unfinished: "unfinished has no metrics.json yet; repeat the command of the prediction",
    places[0]: "a/sft is given twice",
  }
  for place, message in expected.items():
    with pytest.raises(InputError, match=message) as caught:
      directory.read_all([places[0], str(place)])
    assert "\n" not in str(caught.value)
  with pytest.raises(InputError, match="no directory is given"):
    report.report([])
  with pytest.raises(InputError, match="page.html: cannot be written .*; name another place"):
    report.report(places, str(tmp_path / "no" / "page.html"))


def test_a_half_written_last_line_is_left_out(tmp_path):
  place = runs.train(tmp_path / "run", "sft", SFT_LINES)
  with open(place / "metrics.jsonl", "a", encoding="utf-8") as file:
    file.write('{"step": 4, "lo')
  (run,) = directory.read_all([str(place)])
  assert run.lines == SFT_LINES


def test_the_script(places, tmp_path):
  output = tmp_path / "page.html"
  command = [sys.executable, "scripts/report.py", places[0], f"--output={output}", places[2]]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert "<h2>PPO</h2>" in output.read_text()
  command = [sys.executable, "scripts/report.py", str(tmp_path / "missing")]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 1
  assert done.stderr.startswith(f"error: {tmp_path}/missing is not a directory")
