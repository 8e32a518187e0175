"""A tiny model, good records about drawn pictures, and a run on them."""

import pytest

from scripts import train_sft
from tests import sft_run, tiny_models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  directory = tmp_path_factory.mktemp("model")
  tiny_models.make_llava(str(directory))
  return directory


@pytest.fixture
def records(tmp_path):
  """24 good records; their pictures are in tmp_path / "data"."""
  return sft_run.make_records(str(tmp_path / "data"), 24)


@pytest.fixture
def train(model, tmp_path):
  """`(records, **overrides)`: trains on them in tmp_path / "run"."""

  def run(records, **overrides):
    path = tmp_path / "data" / "train.json"
    if isinstance(records, str):
      path.write_text(records)
    else:
      sft_run.write_json(path, records)
    settings = {"data.shuffle": False, "save_every": 2, **overrides}  # four records a step
    train_sft.train_and_evaluate(
      sft_run.make_config(model, path, **settings), str(tmp_path / "run")
    )

  return run
