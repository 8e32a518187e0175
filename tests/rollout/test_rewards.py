"""What scores answers: models with other tokenizers, functions, sums, and scores that are none."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
import torch

from scripts import train_ppo
from tests import parity, sft_run
from tests.rollout import tiny_ppo
from vlalign_jax.data.encode import encode
from vlalign_jax.errors import InputError
from vlalign_jax.input_pipeline import prepare, prompts
from vlalign_jax.rollout import collect, learn
from vlalign_jax.sharding import hosts
from vlalign_jax.steps import advantages as steps

FUNCTION = "tests.rollout.scorers:"
GRPO = {"ppo.estimator": "grpo", "ppo.num_generations": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory, compile_cache):
  return tiny_ppo.make(str(tmp_path_factory.mktemp("ppo")))


def first_prompts(run):
  with run.train.batches() as batches:
    rows = next(batches)
  del rows["skipped"]
  records = [run.records[run.train.plan.rows_of(0, row)[0]] for row in range(len(rows["tokens"]))]
  return hosts.to_device(run.held.mesh, rows), records


def make_rollout(run):
  """(Rollout of the first step, the records of its rows)."""
  rows, records = first_prompts(run)
  return collect.collect(run.held, run.state, rows, records, np.arange(len(records)), 3), records


def test_a_reward_model_with_another_tokenizer_reads_the_text(files, tmp_path):
  directory = str(tmp_path / "other")
  scorer, kernel, tokenizer = tiny_ppo.make_text_reward(directory)
  config = files.config(**GRPO, **{"ppo.reward_model": directory})
  run = tiny_ppo.make_run(files, config, str(tmp_path / "run"))
  rollout, records = make_rollout(run)
  texts = rollout.texts(run.held.tokenizer)
  opened = run.held.reader.source
  for row, record in enumerate(records):
    for n, text in enumerate(texts[row]):
      *before, last = record.turns
      answered = dataclasses.replace(record, turns=(*before, dataclasses.replace(last, gpt=text)))
      example = encode(
        answered,
        "vicuna",
        tokenizer,
        opened.layout,
        10_000,
      ).example
      load_image = run.train.load_image
      shown = [load_image(os.path.join(files.directory, path))[0] for path in record.images]
      pixels = parity.pixel_values(opened.config, shown) if shown else None
      tokens = torch.tensor(example.tokens)[None].long()
      with torch.no_grad():
        hidden = scorer.model(input_ids=tokens, pixel_values=pixels).last_hidden_state
      wanted = float(hidden[0, -1] @ kernel)
      assert rollout.scores[row, n] == pytest.approx(wanted, rel=1e-4, abs=1e-4)

  config = files.config(**{"ppo.reward_model": directory})
  with pytest.raises(InputError, match='has another tokenizer.*set config.ppo.critic_init="actor"'):
    tiny_ppo.make_run(files, config, str(tmp_path / "critic"))


@pytest.mark.slow
def test_model_and_function_are_summed_and_what_is_no_number_is_left_out(files, tmp_path):
  weights = {"ppo.reward_weight": 0.5, "ppo.function_weight": 2.0}
  alone = make_rollout(tiny_ppo.make_run(files, files.config(**GRPO), str(tmp_path / "alone")))[0]
  config = files.config(**GRPO, **weights, **{"ppo.reward_function": FUNCTION + "some"})
  run = tiny_ppo.make_run(files, config, str(tmp_path / "both"))
  rollout, _ = make_rollout(run)
  lengths = np.array([[len(text) for text in row] for row in rollout.texts(run.held.tokenizer)])
  wanted = 0.5 * alone.scores + 2.0 * np.where(lengths % 2, lengths / 10, np.nan)
  np.testing.assert_allclose(rollout.scores, wanted, rtol=1e-5)
  bad = int(np.sum(np.isnan(wanted)))
  assert 0 < bad < wanted.size
  step = learn.make_train_step(run.held, run.train, run.records)
  state, metrics, _ = step(run.state, first_prompts(run)[0], {})
  assert metrics["val/bad_scores"] > 0
  assert metrics["skipped_steps"] == 0
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
  assert np.isfinite(list(map(float, metrics.values()))).all()


def test_a_function_alone_scores_and_sees_the_record(files, tmp_path):
  function = {"ppo.reward_model": "", "ppo.reward_function": FUNCTION + "length"}
  run = tiny_ppo.make_run(files, files.config(**GRPO, **function), str(tmp_path))
  rollout, _ = make_rollout(run)
  texts = rollout.texts(run.held.tokenizer)
  np.testing.assert_array_equal(rollout.scores, [[len(text) for text in row] for row in texts])


@pytest.mark.slow
def test_a_function_finds_every_column_of_a_record(files, tmp_path):
  with open(f"{files.directory}/train.json", encoding="utf-8") as file:
    records = json.load(file)
  for number, record in enumerate(records):
    record["solution"] = {"score": 10 * number}
  path = sft_run.write_json(tmp_path / "train.json", records)
  function = {"ppo.reward_model": "", "ppo.reward_function": FUNCTION + "by_column"}
  settings = {"data.train": path, "data.images": files.directory}
  run = tiny_ppo.make_run(files, files.config(**GRPO, **function, **settings), str(tmp_path))
  rollout, shown = make_rollout(run)
  wanted = [[10 * record.index + len(record.images)] * 2 for record in shown]
  np.testing.assert_array_equal(rollout.scores, wanted)


def test_prompts_without_pictures(files, tmp_path):
  """The tower has no part in such a run, in any role."""
  with open(f"{files.directory}/train.json", encoding="utf-8") as file:
    records = json.load(file)
  for record in records:
    record.pop("image", None)
    for turn in record["conversations"]:
      turn["value"] = turn["value"].replace("<image>", "").strip()
  path = sft_run.write_json(tmp_path / "text.json", records)
  run = tiny_ppo.make_run(files, files.config(**{"data.train": path}), str(tmp_path / "run"))
  rows, _ = first_prompts(run)
  assert rows["images"].shape[1] == 0
  step = learn.make_train_step(run.held, run.train, run.records)
  _, metrics, _ = step(run.state, rows, {})
  assert metrics["val/sampler_gap"] < 1e-5
  assert np.isfinite(list(map(float, metrics.values()))).all()


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("never", "none of the 8 answers of a rollout has a finite score"),
    ("fails", "reward_function=.*:fails failed on .*train.json, record .* KeyError"),
    ("missing", "reward_function=.*:missing: AttributeError"),
  ],
)
def test_a_function_that_cannot_be_used_is_named(name, message, files, tmp_path):
  function = {"ppo.reward_model": "", "ppo.reward_function": FUNCTION + name}
  config = files.config(**GRPO, **function, **{"data.eval": ""})
  with pytest.raises(InputError, match=message):
    train_ppo.train_and_evaluate(config, str(tmp_path))


def test_steps_before_a_rollout_that_fails_are_saved(files, tmp_path):
  function = {"ppo.reward_model": "", "ppo.reward_function": FUNCTION + "until"}
  settings = {"batch_size": 2, "max_steps": 4, "save_every": 0, "data.eval": ""}
  config = files.config(**GRPO, **function, **settings)
  with pytest.raises(InputError, match="the judge does not answer"):
    train_ppo.train_and_evaluate(config, str(tmp_path))
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
  with pytest.raises(InputError, match="the judge does not answer"):
    train_ppo.train_and_evaluate(config, str(tmp_path))  # goes on from there, with the same prompts


def test_an_empty_answer_is_scored_as_any_other(files, tmp_path):
  """The first token ends every answer."""
  run = tiny_ppo.make_run(files, files.config(**GRPO), str(tmp_path / "a"))
  ends = tuple(n for n in range(512) if n != run.model.image_token_id)
  held = tiny_ppo.with_sampling(run, dataclasses.replace(run.sampling, stop_tokens=ends))
  rows, records = first_prompts(run)
  rollout = collect.collect(held, run.state, rows, records, np.arange(len(records)), 3)
  assert np.all(np.asarray(rollout.lengths) == 1)
  assert np.isfinite(rollout.scores).all()
  reader = tiny_ppo.text_reader(run, images=2, answers=2)
  empty = reader.rows(records, [["", ""]] * len(records))
  assert (empty["answers"] >= 0).all()
  gray = dataclasses.replace(reader, blank=True).rows(records, [["", ""]] * len(records))
  there = empty["images"].any(axis=(2, 3, 4), keepdims=True)
  np.testing.assert_array_equal(gray["images"], np.broadcast_to(127 * there, gray["images"].shape))


def test_answers_of_which_none_ends_keep_their_scores(files, tmp_path):
  """All are cut, which costs each of them the penalty."""
  config = files.config(**GRPO, **{"ppo.missing_eos_penalty": 0.5})
  run = tiny_ppo.make_run(files, config, str(tmp_path))
  held = tiny_ppo.with_sampling(run, dataclasses.replace(run.sampling, stop_tokens=()))
  seen = []
  step = learn.make_train_step(
    held, run.train, run.records, lambda step, rollout, numbers: seen.append(rollout)
  )
  state, metrics, _ = step(run.state, first_prompts(run)[0], {})
  (rollout,) = seen
  assert not rollout.ended.any()
  assert (rollout.lengths == config.ppo.max_new_tokens).all()
  assert metrics["val/num_eos_tokens"] == 0
  assert metrics["val/bad_scores"] == 0
  assert metrics["objective/scores"] == pytest.approx(rollout.scores.mean(), rel=1e-5)
  assert metrics["objective/scores_std"] == pytest.approx(rollout.scores.std(), rel=1e-5)
  less = np.clip(rollout.scores - 0.5, -config.ppo.score_clip, config.ppo.score_clip)
  assert metrics["objective/shaped_scores"] == pytest.approx(less.mean(), rel=1e-5)
  assert np.isfinite(list(map(float, metrics.values()))).all()
  assert metrics["skipped_steps"] == 0
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
  # Without discount, penalty of KL and critic a token returns what its answer got at its last one.
  gae = {"estimator": "gae", "gamma": 1.0, "lam": 1.0, "whiten_advantages": False}
  config.ppo.update(gae)
  logps = rollout.log_probabilities
  fields, _ = steps.compute_advantages(
    rollout.scores,
    rollout.scores,
    logps,
    logps,
    logps,
    np.zeros(logps.shape, np.float32),
    rollout.lengths,
    rollout.ended,
    0.1,
    settings=config.ppo,
  )
  wanted = np.broadcast_to(less[..., None], logps.shape)
  np.testing.assert_allclose(fields["returns"], wanted, rtol=1e-5)
  np.testing.assert_allclose(fields["advantages"], wanted, rtol=1e-5)


def test_prompts_that_do_not_fit_are_skipped_and_counted(files, tmp_path, caplog):
  config = files.config(**GRPO, **{"data.max_length": 64})
  assert prepare.load_records(prompts.TASK, config)
  with caplog.at_level("INFO"):
    run = tiny_ppo.make_run(files, config, str(tmp_path))
  assert "skipped, their prompt does not fit data.max_length=64" in caplog.text
  assert 0 < run.train.records < len(run.records)
  config = files.config(**GRPO, **{"data.max_length": 8})
  with pytest.raises(InputError, match="no record .* has a prompt that fits"):
    tiny_ppo.make_run(files, config, str(tmp_path / "none"))
