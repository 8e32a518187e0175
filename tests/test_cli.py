"""Tests that mistakes on the command line end in one line that names the flag and the fix."""

import logging
import pathlib
import shlex
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from vlalign_jax import cli
from vlalign_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def parse(monkeypatch):
  """Returns `(*arguments) -> config`, which reads a command line as scripts do."""

  def parse(*arguments):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    flags.DEFINE_string("workdir", "", "", flag_values=values)
    for name in ("topology", "json"):  # of plan.py
      flags.DEFINE_string(name, "", "", flag_values=values)
    flags.DEFINE_bool("search", False, "", flag_values=values)
    flags.DEFINE_integer("show", 0, "", flag_values=values)  # of check_data.py
    argv = ["train_sft.py", *arguments]
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.chdir(ROOT)
    cli._parse(argv)
    return values.config

  return parse


DEMO = "--config=configs/sft.py:demo"
BAD_COMMANDS = {
  "misspelt key": (
    [DEMO, "--config.data.trian=x"],
    ["unknown key config.data.trian; did you mean config.data.train?"],
  ),
  "misspelt key, value apart": (
    [DEMO, "--config.num_train_epoch", "3"],
    ["unknown key config.num_train_epoch; did you mean config.num_train_epochs?"],
  ),
  "key without its group": (
    [DEMO, "--config.learning_rate=1"],
    ["unknown key config.learning_rate; did you mean config.optim.learning_rate?"],
  ),
  "key in the wrong group": (
    [DEMO, "--config.train.shuffle=false"],
    ["unknown key config.train.shuffle; did you mean config.data.shuffle?"],
  ),
  "switch that does not exist": (
    [DEMO, "--noconfig.data.pakc"],
    ["did you mean config.data.pack?"],
  ),
  "key below a key": ([DEMO, "--config.data.train.x=1"], ["did you mean config.data.train?"]),
  "group": ([DEMO, "--config.data=x"], ["config.data is a group of keys", "--config.data."]),
  "key without config.": (
    [DEMO, "--batch_size=3"],
    ["unknown flag --batch_size; did you mean --config.batch_size?"],
  ),
  "key without dashes": (
    [DEMO, "config.num_train_epochs=3"],
    ["'config.num_train_epochs=3' is not a flag"],
  ),
  "misspelt flag": ([DEMO, "--workdri=x"], ["'workdri'", "Did you mean: workdir"]),
  "not a number": (
    [DEMO, "--config.batch_size=many"],
    ["config.batch_size is 'many'; it must be a whole number"],
  ),
  "not a whole number": (
    [DEMO, "--config.max_steps", "1.5"],
    ["config.max_steps is '1.5'; it must be a whole number"],
  ),
  "not a fraction": (
    [DEMO, "--config.num_train_epochs=two"],
    ["config.num_train_epochs is 'two'; it must be a number"],
  ),
  "not true or false": (
    [DEMO, "--config.train.embeddings=maybe"],
    ["config.train.embeddings is 'maybe'; it must be true or false"],
  ),
  "value missing": (
    [DEMO, "--config.num_train_epochs"],
    ["Missing value", "--config.num_train_epochs"],
  ),
  "config missing": (
    ["--config.num_train_epochs=3"],
    ["--config.num_train_epochs changes a config", "is missing"],
  ),
  "config after its keys": (
    ["--config.num_train_epochs=3", DEMO],
    ["--config.num_train_epochs=3", "before"],
  ),
  "no such config file": (["--config=configs/stf.py"], ["no file 'configs/stf.py'"]),
  "no such preset": (
    ["--config=configs/sft.py:demmo"],
    ["--config=configs/sft.py:demmo", "no SFT preset 'demmo'", "demo, llava15_pretrain"],
  ),
}


@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_bad_command_line(parse, name):
  arguments, expected = BAD_COMMANDS[name]
  with pytest.raises(InputError) as caught:
    parse(*arguments)
  assert "\n" not in str(caught.value)
  for part in expected:
    assert part in str(caught.value)


BAD_CONFIG_FILES = {
  "not Python": ("def get_config(:", ["SyntaxError", "line 1"]),
  "no get_config": ("x = 1", ["'get_config'"]),
  "fails": ("def get_config():\n  return [][0]", ["IndexError: list index out of range"]),
  "no config": ("def get_config():\n  return {}", ["returns dict, not ConfigDict"]),
  "value of another type": (
    "from vlalign_jax.stages import defaults\n"
    "def get_config():\n  c = defaults('sft')\n  c.batch_size = 'x'\n  return c",
    ["batch_size", "str", "int"],
  ),
}


@pytest.mark.parametrize("name", BAD_CONFIG_FILES)
def test_bad_config_file(parse, tmp_path, name):
  text, expected = BAD_CONFIG_FILES[name]
  path = tmp_path / "mine.py"
  path.write_text(text)
  with pytest.raises(InputError) as caught:
    parse(f"--config={path}")
  assert "\n" not in str(caught.value)
  for part in (str(path), *expected):
    assert part in str(caught.value)


def test_good_command_line(parse):
  config = parse(
    "--config=configs/sft.py:llava15_pretrain",
    "--workdir=x",
    "--config.data.train=a.json,b.json",
    "--config.optim.learning_rate=1e-4",
    "--noconfig.data.shuffle",
    "--config.train.embeddings=false",
    "--config.num_train_epochs",
    "2",
  )
  assert config.data.train == "a.json,b.json"
  assert config.optim.learning_rate == 1e-4
  assert config.data.shuffle is False
  assert config.train.embeddings is False
  assert config.num_train_epochs == 2.0
  assert config.batch_size == 256  # the preset's


def _documented_commands() -> list[str]:
  """Returns every command with a config in the README, docs and the docstrings of configs."""
  pages = ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").glob("*.py")
  texts = [path.read_text() for path in pages]
  lines = "\n".join(texts).replace("\\\n", " ").splitlines()
  parts = (line.partition("python scripts/")[1:] for line in lines if "--config=" in line)
  return [f"{python}{rest}" for python, rest in parts if python]


def test_documented_commands(parse):
  commands = _documented_commands()
  assert len(commands) > 2
  for command in commands:
    assert command.startswith("python ")
    script, *arguments = shlex.split(command.removesuffix(" ..."))[1:]
    assert (ROOT / script).is_file()
    arguments = [argument.replace("PRESET", "demo") for argument in arguments]
    assert parse(*arguments) is not None


def test_config_is_optional(parse):
  assert parse("--workdir=x") is None


def test_log_keeps_warnings_and_our_own_lines(monkeypatch):
  monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / "train_sft.py")])

  def passes(path, level):
    return cli._is_logged(logging.LogRecord("absl", level, str(path), 1, "", (), None))

  orbax = "/usr/lib/python3/site-packages/orbax/checkpoint/checkpoint_manager.py"
  assert not passes(orbax, logging.INFO)
  assert passes(orbax, logging.WARNING)
  assert passes(ROOT / "vlalign_jax" / "data" / "sft.py", logging.INFO)
  assert passes(ROOT / "scripts" / "train_sft.py", logging.INFO)


HIDES_TORCH = "import sys; sys.modules['torch'] = None; "


@pytest.mark.parametrize("first", ["", "import vlalign_jax; "])
def test_transformers_does_not_warn_about_torch(first):
  done = subprocess.run(
    [sys.executable, "-c", HIDES_TORCH + first + "import transformers"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  assert ("PyTorch was not found" in done.stderr) == (not first)
