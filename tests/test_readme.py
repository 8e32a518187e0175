"""README, CONTRIBUTING and docs/: the files, links, commands and keys that they name exist."""

import importlib
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from ml_collections import ConfigDict

from scripts import config_tables

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STAGES = ("sft", "reward", "dpo", "ppo", "predict")
# A path of the repository in code, or a name of a script.
PATH = re.compile(
  r"(?<![\w./-])((?:scripts|benchmarks|configs|vlalign_jax|tests)/[\w/]+\.(?:py|sh))"
)
# The package's own folders are named without it.
MODULE = re.compile(r"`((?:losses|planning|stages|steps|weights|models)/[\w/]+\.py)`")

all_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def flatten(config: ConfigDict, prefix: str = "") -> set[str]:
  """Returns dotted keys."""
  keys = set()
  for key, value in config.items():
    is_group = isinstance(value, ConfigDict)
    keys |= flatten(value, f"{prefix}{key}.") if is_group else {f"{prefix}{key}"}
  return keys


KEYS = set().union(*(flatten(importlib.import_module(f"configs.{s}").get_config()) for s in STAGES))
GROUPS = {key.split(".")[0] for key in KEYS if "." in key}


def code_of(text: str) -> str:
  """Returns what a page shows as code: words in backticks and indented lines."""
  text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
  return "\n".join(a or b for a, b in re.findall(r"`([^`]+)`|^    (.*)$", text, re.MULTILINE))


def anchors_of(page: pathlib.Path) -> set[str]:
  """Returns the anchors of a page's headings, as GitHub makes them."""
  headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
  return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
  assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_is_in_the_readme():
  text = README.read_text(encoding="utf-8")
  names = [f"docs/{page.name}" for page in PAGES if page.parent != ROOT]
  assert len(names) > 10
  assert [name for name in names if f"({name})" not in text] == []


@all_pages
def test_links_lead_somewhere(page):
  links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
  broken = []
  for link in links:
    if "://" in link:
      continue
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    if not target.exists() or (anchor and anchor not in anchors_of(target)):
      broken.append(link)
  assert broken == []


@all_pages
def test_named_files_and_presets_exist(page):
  text = page.read_text(encoding="utf-8")
  code = code_of(text)
  missing = [path for path in PATH.findall(code) if not (ROOT / path).exists()]
  missing += [path for path in MODULE.findall(text) if not (ROOT / "vlalign_jax" / path).exists()]
  missing += [
    module
    for module in re.findall(r"python -m (benchmarks\.\w+)", code)
    if not (ROOT / f"{module.replace('.', '/')}.py").exists()
  ]
  missing += [
    file for file in re.findall(r"requirements[\w-]*\.txt", code) if not (ROOT / file).exists()
  ]
  for stage, preset in re.findall(r"configs/(\w+)\.py:(\w+)", code):
    if stage != "STAGE" and preset not in importlib.import_module(f"configs.{stage}").PRESETS:
      missing.append(f"{stage}:{preset}")
  missing = [name for name in missing if "STAGE" not in name]
  assert missing == []


@all_pages
def test_named_commands_are_installed(page):
  project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
  commands = re.findall(r"vlalign-[a-z-]+", page.read_text(encoding="utf-8"))
  assert set(commands) <= set(project["scripts"])


@all_pages
def test_keys_in_commands_exist(page):
  keys = re.findall(r"--config\.([\w.]+)=", page.read_text(encoding="utf-8"))
  assert {key for key in keys if key != "KEY"} <= KEYS


@all_pages
def test_keys_in_the_text_exist(page):
  """Tests keys such as `data.max_length` and `ppo.estimator=rloo`."""
  words = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
  names = [match[1] for word in words if (match := re.match(r"(\w+\.[a-z_0-9]+)(?:=.*)?$", word))]
  keys = [name for name in names if not name.endswith((".json", ".html", ".md"))]
  assert {key for key in keys if key.split(".")[0] in GROUPS} <= KEYS


def test_the_tables_of_keys_are_current():
  done = subprocess.run(
    [sys.executable, "scripts/config_tables.py", "--check"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr


def test_the_tables_have_every_key():
  text = config_tables.PAGE.read_text(encoding="utf-8")
  shown = re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE)
  assert set(shown) == KEYS - {"stage"}


CODE = """
def add_keys(c):
  # --- First. What comes first.
  c.data.one = 1  # the one
  # Two
  # lines.
  c.data.two = 2

  # --- Second.

  # Above the second.
  own.three = 3
  c.four = f(
    4
  )  # at the end
  c.five = 5


def other(c):
  c.data.six = 6  # of another function
"""


def test_meanings_are_the_comments_of_the_function(tmp_path):
  (tmp_path / "keys.py").write_text(CODE)
  assert config_tables.read_meanings(tmp_path / "keys.py", "add_keys") == {
    "data.one": ("the one", "First. What comes first."),
    "data.two": ("Two lines.", "First. What comes first."),
    "own.three": ("Above the second.", "Second."),
    "four": ("at the end", "Second."),
    "five": ("", "Second."),
  }


def test_a_key_without_a_meaning_is_named(tmp_path, monkeypatch):
  code = (ROOT / "vlalign_jax/stages/reward.py").read_text(encoding="utf-8")
  (tmp_path / "reward.py").write_text(re.sub(r"(c\.reward\.margin = .*?)  #.*", r"\1", code))
  sections = [
    (title, stages, ((tmp_path / "reward.py", "add_keys"),) if stages == ("reward",) else sources)
    for title, stages, sources in config_tables.SECTIONS
  ]
  monkeypatch.setattr(config_tables, "SECTIONS", sections)
  with pytest.raises(SystemExit, match=r"what these keys mean: reward\.margin$"):
    config_tables.make_page()
