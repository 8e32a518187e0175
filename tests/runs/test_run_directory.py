"""What a run is resumed with: configs of other versions, and which differences are harmless."""

import json

import pytest

from tests import sft_run
from vlalign_jax import config as configs
from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.runs import run_directory

PLAN = {"steps": 6, "records": 24, "examples": 7}


@pytest.fixture
def workdir(tmp_path):
  """A run directory that has saved something."""
  run_directory.open_run(str(tmp_path), _config())
  (tmp_path / "checkpoints" / "2").mkdir(parents=True)
  return tmp_path


def _config(**overrides):
  return sft_run.make_config("model", "train.json", **overrides)


def _stored(workdir) -> dict:
  return json.loads((workdir / "config.json").read_text())


def test_keys_of_a_newer_version_do_not_block_it(workdir):
  """...as long as they have their defaults."""
  stored = _stored(workdir)
  del stored["save_best_limit"], stored["optim"]["cycles"], stored["mesh"]
  (workdir / "config.json").write_text(json.dumps(stored))
  assert run_directory.open_run(str(workdir), _config())
  assert _stored(workdir) == json.loads(json.dumps(_config().to_dict()))

  (workdir / "config.json").write_text(json.dumps(stored))
  with pytest.raises(InputError, match=r"\(optim.cycles: 1 there, 2 now\)"):
    run_directory.open_run(str(workdir), _config(**{"optim.cycles": 2}))


def test_a_key_that_this_version_lacks_blocks_it(workdir):
  (workdir / "config.json").write_text(json.dumps(_stored(workdir) | {"future": 3}))
  with pytest.raises(InputError, match=r"\(future: 3 there, None now\)"):
    run_directory.open_run(str(workdir), _config())


@pytest.mark.parametrize("key", run_directory.HARMLESS + run_directory.ROUNDING)
def test_harmless_keys_exist(key):
  stages = [trees.flatten(configs.defaults(stage).to_dict()) for stage in ("sft", "ppo")]
  assert any(key.replace(".", "/") in known for known in stages)


def test_what_costs_rounding_is_logged(workdir, caplog):
  config = _config(**{"grad_accumulation": 2, "mesh.zero_stage": 3, "log_every": 5})
  assert run_directory.open_run(str(workdir), config)
  progress = {"config": _config().to_dict(), "plan": PLAN}
  with caplog.at_level("INFO", logger="absl"):
    run_directory.check_progress(progress, config, PLAN, str(workdir))
  assert "(grad_accumulation: 1 there, 2 now; mesh.zero_stage: 0 there, 3 now)" in caplog.text


def test_a_checkpoint_knows_its_config(workdir):
  """...should config.json be lost; those of the first version do not."""
  (workdir / "config.json").unlink()
  assert run_directory.open_run(str(workdir), _config(batch_size=8))
  progress = {"config": _config().to_dict(), "plan": PLAN}
  with pytest.raises(InputError, match=r"\(batch_size: 4 there, 8 now\)"):
    run_directory.check_progress(progress, _config(batch_size=8), PLAN, str(workdir))
  run_directory.check_progress({"plan": PLAN}, _config(), PLAN, str(workdir))


def test_lines_that_are_logged_again_are_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  assert run_directory.metrics_until(path, 9) == ""
  path.write_text('{"step": 0, "eval/loss": 2.0}\n{"step": 1, "loss": 1.5}\n')
  assert run_directory.metrics_until(path, 0) == ""
  assert len(run_directory.metrics_until(path, 1).splitlines()) == 2
  lines = [f'{{"step": {step}}}\n' for step in (1, 2, 3)]
  path.write_text("".join(lines) + '{"step": 3, "lo')
  assert run_directory.metrics_until(path, 2) == "".join(lines[:2])
  assert run_directory.metrics_until(path, 9) == "".join(lines)
  path.write_text('{"step": 1}\n{"step": 2}')  # whole, but for its end
  assert run_directory.metrics_until(path, 9) == '{"step": 1}\n'
