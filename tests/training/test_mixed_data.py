"""Records with and without pictures in one run: the losses of separate ones, few compilations."""

import dataclasses

import numpy as np
import pytest

from scripts import train_dpo, train_reward, train_sft
from tests import sft_run, tiny_models
from vlalign_jax.input_pipeline import prepare
from vlalign_jax.stages import sft

SCRIPTS = {"sft": train_sft, "reward": train_reward, "dpo": train_dpo}
# At its first step a policy is the reference, and its loss the same whatever it reads.
VALUES = {"sft": "loss", "reward": "loss", "dpo": "logps/chosen"}
RECORDS = 12


@pytest.fixture(scope="module")
def directory(tmp_path_factory, compile_cache):
  """Files of records with pictures, without, and both in turn."""
  directory = tmp_path_factory.mktemp("mixed")
  tiny_models.make_llava(str(directory / "model"))
  pictures = sft_run.make_records(str(directory), RECORDS)
  pictures = [record for record in pictures if "image" in record]
  texts = [
    {"id": f"t{n}", "conversations": sft_run.conversation(f"Is {n} many?", "no, few" + n * " so")}
    for n in range(len(pictures))
  ]
  for kind, of_kind in (("sft", list), ("ranked", sft_run.ranked)):
    parts = of_kind(pictures), of_kind(texts)
    mixed = [record for pair in zip(*parts, strict=True) for record in pair]
    for name, records in zip(("pictures", "texts", "mixed"), (*parts, mixed), strict=True):
      sft_run.write_json(directory / f"{kind}_{name}.json", records)
  return directory


def first_line(directory, stage: str, name: str, size: int, workdir):
  kind = "sft" if stage == "sft" else "ranked"
  config = sft_run.make_config(
    directory / "model",
    directory / f"{kind}_{name}.json",
    stage,
    **{"batch_size": size, "max_steps": 1, "optim.warmup_ratio": 0.0, "data.shuffle": False},
  )
  SCRIPTS[stage].train_and_evaluate(config, str(workdir / f"{stage}_{name}"))
  return sft_run.read_metrics(str(workdir / f"{stage}_{name}"))[0]


@pytest.mark.parametrize(
  "stage",
  [name if name == "sft" else pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS],
)
def test_a_mixed_batch_has_the_loss_of_its_parts(stage, directory, tmp_path):
  half = sum(n % 5 != 4 for n in range(RECORDS))
  pictures, texts, mixed = (
    first_line(directory, stage, name, size, tmp_path)
    for name, size in (("pictures", half), ("texts", half), ("mixed", 2 * half))
  )
  shares = [line["learned_tokens"] if stage == "sft" else 1.0 for line in (pictures, texts)]
  mixed, *parts = (line[VALUES[stage]] for line in (mixed, pictures, texts))
  assert abs(parts[0] - parts[1]) > 1e-2
  assert mixed == pytest.approx(np.average(parts, weights=shares), rel=1e-5)


@pytest.mark.parametrize(("pack", "most"), [(True, 3), (False, 4)])
def test_a_mixed_run_compiles_its_step_as_often_as_is_said(
  pack, most, directory, tmp_path, monkeypatch
):
  made = {}

  def watched(function, name):
    def call(*arguments):
      made[name] = function(*arguments)
      return made[name]

    return call

  stage = sft.STAGE
  make_program = watched(stage.make_program, "make_program")
  monkeypatch.setattr(sft, "STAGE", dataclasses.replace(stage, make_program=make_program))
  prepare_train = watched(prepare.prepare_train, "prepare_train")
  monkeypatch.setattr(prepare, "prepare_train", prepare_train)
  config = sft_run.make_config(
    directory / "model",
    directory / "sft_mixed.json",
    **{"batch_size": 3, "num_train_epochs": 3.0, "data.pack": pack},
  )
  train_sft.train_and_evaluate(config, str(tmp_path))
  plan = made["prepare_train"].plan
  shapes = set(zip(plan.row_counts.tolist(), plan.lengths.tolist(), strict=True))
  assert plan.steps > 2 * most
  assert made["make_program"].train_step._cache_size() == len(shapes) <= most
