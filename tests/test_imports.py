"""Imports go one way: ARCHITECTURE.md's picture of the packages is what the code does."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "vlalign_jax"


def read_picture(text: str) -> dict[str, int]:
  """Returns package or module -> its line in the picture, counted from the bottom."""
  section = text.split("## One way down\n")[1].split("\n## ")[0]
  lines = [line.split("#")[0] for line in section.splitlines() if line.startswith("    ")]
  return {name: level for level, line in enumerate(reversed(lines)) for name in line.split()}


def imports_of(path: pathlib.Path) -> set[str]:
  """Returns the packages and modules directly below vlalign_jax that a file imports."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == PACKAGE.name:
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE.name}."):
      names.add(node.module.split(".")[1])
    elif isinstance(node, ast.Import):
      modules = [alias.name.split(".") for alias in node.names]
      names |= {parts[1] for parts in modules if parts[0] == PACKAGE.name and len(parts) > 1}
  return names


PICTURE = read_picture((ROOT / "ARCHITECTURE.md").read_text())
PARTS = sorted(path.stem for path in PACKAGE.iterdir() if not path.name.startswith("__"))


def test_the_picture_has_every_part():
  assert sorted(PICTURE) == PARTS


@pytest.mark.parametrize("part", PARTS)
def test_a_part_imports_from_below(part):
  path = PACKAGE / part
  files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
  upward = [
    f"{file.relative_to(ROOT)} imports {name}"
    for file in files
    for name in imports_of(file) - {part}
    if PICTURE[name] >= PICTURE[part]
  ]
  assert not upward


def test_a_cycle_is_noticed(tmp_path):
  file = tmp_path / "file.py"
  file.write_text("from vlalign_jax.rollout import collect\nfrom vlalign_jax import steps, trees\n")
  assert imports_of(file) == {"rollout", "steps", "trees"}
