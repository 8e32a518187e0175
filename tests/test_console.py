"""Tests the commands of an installed package: entry points are scripts, presets are located."""

import pathlib
import tomllib

import pytest

from vlalign_jax import console, presets
from vlalign_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_entry_point_is_a_script():
  points = PROJECT["project"]["scripts"]
  expected = {
    "vlalign-" + name.replace("_", "-"): f"vlalign_jax.console:{name}" for name in console.SCRIPTS
  }
  assert points == expected
  for name in console.SCRIPTS:
    assert (ROOT / "scripts" / f"{name}.py").is_file()
    assert callable(getattr(console, name))


def test_every_package_is_installed():
  packages = {
    ".".join(path.parent.relative_to(ROOT).parts)
    for path in (ROOT / "vlalign_jax").rglob("__init__.py")
  }
  installed = set(PROJECT["tool"]["setuptools"]["packages"])
  assert installed == packages | {"vlalign_jax.configs", "vlalign_jax.scripts"}


def test_an_unknown_script_is_refused():
  with pytest.raises(InputError, match="no script 'train'; choose from check_data"):
    console.run_script("train")
  with pytest.raises(AttributeError):
    console.train  # noqa: B018


def test_presets_of_the_working_directory_come_first(tmp_path, monkeypatch):
  argv = ["train_sft", "--config=configs/sft.py:demo", "--workdir=runs/sft"]
  monkeypatch.chdir(ROOT)
  assert presets.find_installed(argv) == argv


def test_installed_presets_are_found_elsewhere(tmp_path, monkeypatch):
  """A temporary directory stands in for the installed package of presets."""
  package = tmp_path / "site" / "configs"
  package.mkdir(parents=True)
  (package / "__init__.py").touch()
  (package / "sft.py").touch()
  import vlalign_jax

  monkeypatch.setattr(vlalign_jax, "__path__", [str(package.parent), *vlalign_jax.__path__])
  monkeypatch.chdir(tmp_path)
  argv = presets.find_installed(["x", "--config=configs/sft.py:demo", "--config=configs/no.py"])
  assert argv == ["x", f"--config={package / 'sft.py'}:demo", "--config=configs/no.py"]
