"""PPO as whole runs: resumed exactly, evaluated before and after, read as any other run."""

import json
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from scripts import train_ppo
from tests import parity, sft_run
from tests.process_group import Processes
from tests.rollout import tiny_ppo
from tests.writers.recorder import Recorder
from vlalign_jax import html
from vlalign_jax.errors import InputError
from vlalign_jax.models import vlm
from vlalign_jax.weights import source
from vlalign_jax.writers import choose

pytestmark = pytest.mark.slow

STEPS = 4
TIMING = "perf/"
SETTINGS = {
  "max_steps": STEPS,
  "batch_size": 8,  # four devices, two mini-batches
  "save_every": 2,
  "lora.rank": 2,
  "train.vision": False,
  "train.projector": False,
  "ppo.num_generations": 2,
  "ppo.reward_function": "tests.rollout.scorers:some",
  "ppo.critic_init": "actor",
  "ppo.critic_warmup": 1,
  "ppo.score_queue": 20,
  "ppo.sft_weight": 0.5,
  "ppo.kl_target": 0.01,
  "ppo.kl_horizon": 20.0,
  "ppo.stop_kl": 1e-9,
  "ppo.log_samples_every": 2,
  "ppo.log_samples": 3,
  "ppo.slots": 4,  # of eight prompts
}


@pytest.fixture(scope="module")
def files(tmp_path_factory, compile_cache):
  return tiny_ppo.make(str(tmp_path_factory.mktemp("ppo")))


@pytest.fixture(scope="module")
def writer():
  """Takes the place of the writer of the finished run."""
  return Recorder()


@pytest.fixture(scope="module")
def finished(files, writer, tmp_path_factory):
  """(config, run directory) of a finished run."""
  tiny_ppo.make_text_reward(f"{files.directory}/text")
  paths = {"ppo.reward_model": "text", "ppo.sft_data": "answered.json"}
  paths = {key: f"{files.directory}/{name}" for key, name in paths.items()}
  config = files.config(**SETTINGS, **paths)
  workdir = tmp_path_factory.mktemp("run")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(choose, "_open", lambda *_: writer)
    train_ppo.train_and_evaluate(config, str(workdir))
  return config, workdir


def metrics_of(workdir) -> list[dict]:
  lines = sft_run.read_metrics(workdir)
  return [
    {key: value for key, value in line.items() if not key.startswith(TIMING)} for line in lines
  ]


def checkpoint(workdir, item: str) -> dict:
  with ocp.StandardCheckpointer() as reader:
    tree = reader.restore(pathlib.Path(workdir, "checkpoints", str(STEPS), item))
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def test_a_run_goes_on_exactly_where_a_checkpoint_stands(finished, tmp_path):
  config, done = finished
  workdir = shutil.copytree(done, tmp_path / "run")
  shutil.rmtree(workdir / "checkpoints" / str(STEPS))
  train_ppo.train_and_evaluate(config, str(workdir))
  assert metrics_of(workdir) == metrics_of(done)
  for name in ("rollouts.jsonl", "rollouts.html"):
    assert (workdir / name).read_text() == (done / name).read_text()
  for item in ("params", "optimizer"):
    found, expected = checkpoint(workdir, item), checkpoint(done, item)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
      np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
  assert any("critic" in path and "score" in path for path in checkpoint(done, "optimizer"))


def test_two_processes_go_on_as_one(finished, compile_cache, tmp_path):
  config, done = finished
  workdir = shutil.copytree(done, tmp_path / "run")
  shutil.rmtree(workdir / "checkpoints" / str(STEPS))
  command = sft_run.command_line(config, str(workdir))
  run = Processes(command, compile_cache, devices=2)
  assert run.end(timeout=400) == [0, 0], run.text(0) + run.text(1)
  assert "going on from step 2" in run.text(0)
  near = lambda value: pytest.approx(value, rel=1e-4, abs=1e-5)  # noqa: E731
  for line, wanted in zip(metrics_of(workdir), metrics_of(done), strict=True):
    assert line == {name: near(value) for name, value in wanted.items()}
  for line, wanted in zip(samples_of(workdir), samples_of(done), strict=True):
    numbers = {name: wanted[name] and near(wanted[name]) for name in ("kl", "score")}
    assert line == wanted | numbers


def samples_of(workdir) -> list[dict]:
  return [json.loads(line) for line in (workdir / "rollouts.jsonl").read_text().splitlines()]


def test_metrics_of_a_run(finished):
  lines = metrics_of(finished[1])
  assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
  before, first, *_, last = lines
  assert abs(before["eval/objective/kl"]) < 1e-5  # the actor is the reference yet
  assert last["eval/objective/kl"] != before["eval/objective/kl"]
  assert not {"loss/policy_avg", "loss/sft"} & first.keys()  # only the critic learns
  assert all(line["loss/sft"] > 0 for line in lines[2:])
  assert abs(lines[2]["val/sampler_gap"]) < 1e-5
  coefficients = [line["objective/kl_coef"] for line in lines[1:]]
  assert len(set(coefficients)) > 1
  # Two updates are an epoch; others end by what the policy has moved.
  assert [line["val/updates"] for line in lines[1:]] == [8, 2, 2, 2]


def test_sample_answers_are_shown(finished):
  _, workdir = finished
  lines = samples_of(workdir)
  assert [line["step"] for line in lines] == [1, 1, 1, 3, 3, 3]
  assert all(isinstance(line["kl"], float) and line["images"] is not None for line in lines)
  page = (workdir / "rollouts.html").read_text()
  assert page.index("<h2>step 3</h2>") < page.index("<h2>step 1</h2>")
  pictures = [len(line["images"]) for line in lines if line["sample"] == 0]
  assert page.count('src="data:image/jpeg;base64,') == sum(pictures)
  for line in lines:
    shown = [html.text(line["prompt"]), html.text(line["answer"]), f">{line['kl']:.4g}<"]
    assert all(part in page for part in shown)


def test_writers_have_all_numbers_and_sample_answers(finished, writer):
  _, workdir = finished
  assert writer.closed == [False]
  assert writer.lines == sft_run.read_metrics(workdir)
  lines = samples_of(workdir)
  assert [(name, step) for name, step, _ in writer.tables] == [("rollouts", 1), ("rollouts", 3)]
  rows = [row for _, _, table in writer.tables for row in table]
  for row, line in zip(rows, lines, strict=True):
    picture, images = row.pop("picture"), row.pop("images")
    assert images.split() == line["images"]
    assert (picture is not None) == bool(line["images"])
    assert row == {key: line.get(key) for key in row}
    assert {"prompt", "answer", "reference", "score", "kl", "tokens", "ended"} <= row.keys()


def test_a_finished_run_is_a_policy_as_any_other(finished):
  opened = source.open_source(parity.model_group(init_from=str(finished[1])))
  assert opened.config.head == vlm.LANGUAGE
  assert len(opened.runs) == 1


def test_other_weights_of_the_reward_model_are_refused(files, finished, tmp_path):
  config, done = finished
  workdir = shutil.copytree(done, tmp_path / "run")
  shutil.rmtree(workdir / "checkpoints" / str(STEPS))
  path = pathlib.Path(files.directory, "text", "model.safetensors")
  before = path.read_bytes()
  path.write_bytes(before[:-4] + b"\0\0\0\0")
  try:
    with pytest.raises(InputError, match="started from other weights .*text/model.safetensors"):
      train_ppo.train_and_evaluate(config, str(workdir))
  finally:
    path.write_bytes(before)


def test_other_conversations_are_refused(files, finished, tmp_path):
  config, done = finished
  workdir = shutil.copytree(done, tmp_path / "run")
  shutil.rmtree(workdir / "checkpoints" / str(STEPS))
  path = pathlib.Path(files.directory, "answered.json")
  before = path.read_text()
  sft_run.write_json(path, json.loads(before)[:-1])
  try:
    with pytest.raises(InputError, match="ppo.sft_data: the checkpoint's first 2 .* examples"):
      train_ppo.train_and_evaluate(config, str(workdir))
  finally:
    path.write_text(before)


def test_only_adapters_and_heads_are_kept(finished):
  _, workdir = finished
  assert all("lora_" in path for path in checkpoint(workdir, "params"))
  kept = [path for path in checkpoint(workdir, "optimizer") if "kernel" in path]
  assert kept
  assert all("score" in path for path in kept)
