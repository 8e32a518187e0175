"""README and docs/: every file, script, command and key that they name exists."""

import importlib
import pathlib
import re
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STAGES = ("sft", "reward", "dpo", "ppo", "predict")


def flatten(config: ConfigDict, prefix: str = "") -> set[str]:
  """Dotted keys."""
  keys = set()
  for key in config:
    is_group = isinstance(config[key], ConfigDict)
    keys |= flatten(config[key], f"{prefix}{key}.") if is_group else {f"{prefix}{key}"}
  return keys


KEYS = set().union(*(flatten(importlib.import_module(f"configs.{s}").get_config()) for s in STAGES))


def test_the_readme_is_short():
  assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 150


def test_the_tables_of_keys_are_current():
  done = subprocess.run(
    [sys.executable, "scripts/config_tables.py", "--check"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
  text = page.read_text(encoding="utf-8")
  links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
  missing = [link for link in links if not (page.parent / link).exists()]
  code = "\n".join(a or b for a, b in re.findall(r"`([^`\n]+)`|^    (.*)$", text, re.MULTILINE))
  files = re.findall(
    r"(?<![\w/.-])((?:scripts|benchmarks|configs|vlalign_jax|tests)/[\w/]+\.(?:py|sh))", code
  )
  missing += [file for file in files if "STAGE" not in file and not (ROOT / file).exists()]
  modules = re.findall(r"python -m (benchmarks\.\w+)", code)
  missing += [m for m in modules if not (ROOT / (m.replace(".", "/") + ".py")).exists()]
  presets = re.findall(r"configs/(\w+)\.py:(\w+)", code)
  missing += [
    f"{stage}:{preset}"
    for stage, preset in presets
    if stage in STAGES and preset not in importlib.import_module(f"configs.{stage}").PRESETS
  ]
  assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_in_commands_exist(page):
  keys = re.findall(r"--config\.([\w.]+)=", page.read_text(encoding="utf-8"))
  assert {key for key in keys if key not in KEYS and key != "KEY"} == set()


GROUPS = {key.split(".")[0] for key in KEYS if "." in key}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_in_the_text_exist(page):
  """Such as `data.max_length` or `ppo.estimator=rloo`."""
  code = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
  keys = [match[1] for word in code if (match := re.match(r"(\w+\.[a-z_0-9]+)(?:=.*)?$", word))]
  assert {key for key in keys if key.split(".")[0] in GROUPS and key not in KEYS} == set()
