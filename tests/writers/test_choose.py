"""`log.writers`: unknown names and missing packages end a run before it begins."""

import importlib.util
import json
import subprocess
import sys

import jax
import pytest

from vlalign_jax.errors import InputError
from vlalign_jax.prediction import settings
from vlalign_jax.stages import check, defaults
from vlalign_jax.writers import choose, identity


def log(names: str):
  config = defaults("sft")
  config.log.writers = names
  return config.log


def test_names():
  assert choose.names(defaults("ppo").log) == ["tensorboard"]
  assert choose.names(settings.defaults().log) == []
  assert choose.names(log(" wandb, trackio")) == ["wandb", "trackio"]


@pytest.mark.parametrize(
  ("names", "expected"),
  [
    ("wandb,mlflow", "config.log.writers has 'mlflow'; choose from tensorboard, wandb, trackio"),
    ("wandb,", "config.log.writers has ''; choose from"),
    ("wandb,wandb", "config.log.writers is 'wandb,wandb'; name each writer once"),
  ],
)
def test_unknown_names(names, expected):
  config = defaults("sft")
  config.data.train, config.log.writers = "train.json", names
  with pytest.raises(InputError, match=f"^{expected}"):
    check(config, "sft")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_named(monkeypatch, name):
  monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
  choose.check(log("tensorboard"))
  with pytest.raises(InputError, match=f"{name}', which is not installed: pip install {name}$"):
    choose.check(log(name))


def test_packages_are_imported_only_if_asked_for():
  code = (
    "import sys; from vlalign_jax import stages; from vlalign_jax.training import run; "
    "from vlalign_jax.rollout import run; from vlalign_jax.prediction import predict; "
    "from vlalign_jax.writers import choose; choose.check(stages.defaults('sft').log); "
    "print({'wandb', 'trackio', 'tensorboardX'} & {*sys.modules})"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout == "set()\n"


def test_a_missing_key_of_wandb_is_explained(tmp_path, monkeypatch):
  code = (
    "from tests.writers.test_choose import log; from vlalign_jax.writers import choose\n"
    "try: choose.check(log('wandb'))\n"
    "except Exception as error: print(type(error).__name__, error)"
  )
  monkeypatch.delenv("WANDB_MODE", raising=False)
  monkeypatch.delenv("WANDB_API_KEY", raising=False)
  for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_DIR"):
    monkeypatch.setenv(name, str(tmp_path))
  monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=True,
    stdin=subprocess.DEVNULL,
  )
  assert done.stdout.startswith("InputError config.log.writers: wandb cannot start ("), done.stderr
  assert done.stdout.endswith("run `wandb login`, or set WANDB_MODE=offline\n")


def test_only_process_0_has_writers(tmp_path, monkeypatch):
  config = defaults("sft")
  with choose.opened(config, str(tmp_path)) as writers:
    assert len(writers) == 1
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with choose.opened(config, str(tmp_path)) as writers:
    assert writers == []


def test_an_id_is_kept_by_a_run_that_goes_on(tmp_path):
  first = identity.run_id(str(tmp_path), "wandb", resumes=False)
  other = identity.run_id(str(tmp_path), "trackio", resumes=True)
  assert identity.run_id(str(tmp_path), "wandb", resumes=True) == first
  assert identity.run_id(str(tmp_path), "trackio", resumes=True) == other
  assert identity.run_id(str(tmp_path), "wandb", resumes=False) != first  # it starts again
  assert json.loads((tmp_path / "log.json").read_text()).keys() == {"wandb", "trackio"}
  (tmp_path / "log.json").write_text("[")
  with pytest.raises(InputError, match=r"log\.json cannot be read as JSON .*; delete it"):
    identity.run_id(str(tmp_path), "wandb", resumes=True)


def test_writers_are_closed_as_failed(tmp_path, monkeypatch):
  closed = []

  class Recorder:
    def close(self, failed=False):
      closed.append(failed)

  monkeypatch.setattr(choose, "_open", lambda *_: Recorder())
  with choose.opened(defaults("sft"), str(tmp_path)):
    pass
  with pytest.raises(ZeroDivisionError), choose.opened(defaults("sft"), str(tmp_path)):
    1 / 0  # noqa: B018
  assert closed == [False, True]


def test_all_writers_are_closed_even_if_closing_one_fails(tmp_path, monkeypatch):
  closed = []

  class Fails:
    def __init__(self, name):
      self._name = name

    def close(self, failed=False):
      closed.append((self._name, failed))
      raise OSError("no space left")

  monkeypatch.setattr(choose, "_open", lambda name, *_: Fails(name))
  config = defaults("sft")
  config.log.writers = "wandb,tensorboard"
  with pytest.raises(OSError, match="no space"), choose.opened(config, str(tmp_path)):
    pass
  assert closed == [("tensorboard", False), ("wandb", True)]
