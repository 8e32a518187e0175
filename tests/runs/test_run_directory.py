"""Tests opening run directories: configs of other versions, and which differences are harmless."""

import json

import pytest

from scripts import export_hf
from tests import sft_run
from tests.planning import small
from vlalign_jax import config as configs
from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.rollout import roles
from vlalign_jax.runs import run_directory
from vlalign_jax.weights import adapters, source

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


def test_missing_keys_have_their_defaults(workdir):
  """A run of a version that lacked a key is resumed while the key has its default."""
  stored = _stored(workdir)
  del stored["save_best_limit"], stored["optim"]["cycles"], stored["mesh"]
  (workdir / "config.json").write_text(json.dumps(stored))
  assert run_directory.open_run(str(workdir), _config())
  assert _stored(workdir) == json.loads(json.dumps(_config().to_dict()))

  (workdir / "config.json").write_text(json.dumps(stored))
  with pytest.raises(InputError, match=r"\(optim.cycles: 1 there, 2 now\)"):
    run_directory.open_run(str(workdir), _config(**{"optim.cycles": 2}))


def _open_adapters(workdir: str):
  config = _config(**{"lora.init_from": workdir, "lora.rank": 4})
  adapters.open_start(config, source.with_adapters(small.model(), config.lora), None)


def _open_reward_model(workdir: str):
  roles.open_sources(_config(stage="ppo", **{"ppo.reward_model": workdir}), None, None)


OPENERS = {
  "resume": lambda workdir: run_directory.open_run(workdir, _config()),
  "model.init_from": lambda workdir: source.open_for(_config(**{"model.init_from": workdir})),
  "lora.init_from": _open_adapters,
  "ppo.reward_model": _open_reward_model,
  "--checkpoint": lambda workdir: export_hf.export_run(workdir, f"{workdir}/out", None),
}


@pytest.mark.parametrize("name", OPENERS)
def test_old_names_of_keys_are_refused(workdir, name):
  stored = _stored(workdir)
  stored["steps"], stored["keep"] = stored.pop("max_steps"), stored.pop("save_total_limit")
  stored["optim"]["warmup"] = stored["optim"].pop("warmup_ratio")
  (workdir / "config.json").write_text(json.dumps(stored))
  with pytest.raises(InputError) as caught:
    OPENERS[name](str(workdir))
  assert str(caught.value) == (
    f"{workdir}/config.json was written by an earlier version (or a later one), whose keys had "
    "other names: keep, optim.warmup, steps; export the run with that version, or start again in a "
    "new directory"
  )


def test_old_names_in_a_checkpoint_are_refused(workdir):
  """A run that has lost its config.json is checked by the config in its checkpoint."""
  progress = {"config": _config().to_dict() | {"steps": 6}, "plan": PLAN}
  with pytest.raises(InputError, match="the checkpoint in .* other names: steps; export"):
    run_directory.check_progress(progress, _config(), PLAN, str(workdir))


@pytest.mark.parametrize("key", run_directory.HARMLESS + run_directory.ROUNDING)
def test_harmless_keys_exist(key):
  stages = [trees.flatten(configs.defaults(stage).to_dict()) for stage in ("sft", "ppo")]
  assert any(key.replace(".", "/") in known for known in stages)


def test_keys_that_change_the_rounding_are_logged(workdir, caplog):
  config = _config(**{"grad_accumulation": 2, "mesh.zero_stage": 3, "log_every": 5})
  assert run_directory.open_run(str(workdir), config)
  progress = {"config": _config().to_dict(), "plan": PLAN}
  with caplog.at_level("INFO", logger="absl"):
    run_directory.check_progress(progress, config, PLAN, str(workdir))
  assert "(grad_accumulation: 1 there, 2 now; mesh.zero_stage: 0 there, 3 now)" in caplog.text


def test_a_checkpoint_has_its_config(workdir):
  """It is checked if config.json is lost; checkpoints of the first version have none."""
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
  path.write_text('{"step": 1}\n{"step": 2}')  # the last line lacks its end
  assert run_directory.metrics_until(path, 9) == '{"step": 1}\n'
