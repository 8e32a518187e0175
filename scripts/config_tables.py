"""Writes docs/configuration.md: every config key with its default and its meaning.

  python scripts/config_tables.py [--check]

The meaning of a key is the comment on the line that sets its default, or on the lines above it. The
default is what `get_config()` of configs/STAGE.py returns. With --check nothing is written, and the
exit code is 1 if the page is not current.
"""

import argparse
import ast
import importlib
import io
import pathlib
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator

from ml_collections import ConfigDict

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"
STAGES = ("sft", "reward", "dpo", "ppo")
# (title, stages that have the keys, (file, function) of the code that sets their defaults).
SECTIONS = (
  ("All training stages", STAGES, (("vlalign_jax/config.py", "shared"),)),
  ("Reward models", ("reward",), (("vlalign_jax/stages/reward.py", "add_keys"),)),
  ("DPO", ("dpo",), (("vlalign_jax/stages/dpo.py", "add_keys"),)),
  ("PPO", ("ppo",), (("vlalign_jax/stages/ppo.py", "add_keys"),)),
  ("Prediction", ("predict",), (("vlalign_jax/prediction/settings.py", "defaults"),)),
)
GROUPS = {
  "": "The run",
  "model": "The model",
  "train": "What is trained",
  "lora": "LoRA",
  "data": "Data",
  "optim": "The optimizer",
  "mesh": "Devices",
  "log": "Logging",
  "generation": "Sampling",
}
# A comment `# --- Title. More sentences.` begins a table of its own, up to the next one.
HEADING = "---"
INTRODUCTION = """\
# Configuration

This page lists every configuration key with its default and its meaning.

    python scripts/train_sft.py --config=configs/sft.py:llava15_7b --workdir=runs/sft \\
      --config.data.train=train.json --config.optim.learning_rate=1e-5

**`grad_accumulation` splits the global `batch_size` into micro-batches. In transformers and TRL it
multiplies the batch; here `batch_size` is always the number of examples per update, over all
devices.**

`--config=configs/STAGE.py:PRESET` chooses a preset, and `--config.KEY=VALUE` overrides one key of
it. Each preset is described at the top of its file:

{presets}

The defaults below are those of a config file without a preset, which is its `llava15_7b`. A stage
with another default is named in brackets. An empty cell is an empty text, "none" a missing value.
Some meanings mention the defaults of TRL and of Vision-LLM-Alignment ("original").

`python scripts/config_tables.py` writes this page from the comments in the code.
"""


def read_comments(text: str) -> tuple[dict[int, str], set[int]]:
  """Returns (line number -> comment, numbers of the lines that hold nothing but a comment)."""
  comments, alone = {}, set()
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type == tokenize.COMMENT:
      number, column = token.start
      comments[number] = token.string.removeprefix("#").strip()
      if not token.line[:column].strip():
        alone.add(number)
  return comments, alone


def set_keys(function: ast.FunctionDef) -> Iterator[tuple[str, int, int]]:
  """Yields (key, first line, last line) of `c.GROUP.KEY = default` and `GROUP.KEY = default`."""
  for statement in function.body:
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
      continue
    parts, node = [], statement.targets[0]
    while isinstance(node, ast.Attribute):
      parts.insert(0, node.attr)
      node = node.value
    if parts and isinstance(node, ast.Name):
      root = [] if node.id == "c" else [node.id]
      yield ".".join(root + parts), statement.lineno, statement.end_lineno


def read_meanings(file: pathlib.Path, function: str) -> dict[str, tuple[str, str]]:
  """Returns key -> (meaning, heading that it stands under) in the order of the code.

  Raises:
    SystemExit: the file has no such function.
  """
  text = file.read_text(encoding="utf-8")
  nodes = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == function]
  if not nodes:
    raise SystemExit(f"error: {file} has no function {function}; correct SECTIONS")
  comments, alone = read_comments(text)

  def block(last: int) -> str:
    """Returns the comment lines that end at a line, joined."""
    first = last
    while first in alone:
      first -= 1
    return " ".join(comments[number] for number in range(first + 1, last + 1))

  keys, heading, previous = {}, "", nodes[0].lineno
  for key, first, last in set_keys(nodes[0]):
    for number in range(previous, first):
      if number in alone and number + 1 not in alone and block(number).startswith(HEADING):
        heading = block(number).removeprefix(HEADING).strip()
    above = block(first - 1)
    words = "" if above.startswith(HEADING) else above
    at_the_line = "" if last in alone else comments.get(last, "")
    keys[key] = " ".join(part for part in (words, at_the_line) if part), heading
    previous = last + 1
  return keys


def flatten(config: ConfigDict, prefix: str = "") -> dict:
  """Returns dotted key -> value."""
  values = {}
  for key, value in config.items():
    is_group = isinstance(value, ConfigDict)
    values |= flatten(value, f"{prefix}{key}.") if is_group else {f"{prefix}{key}": value}
  return values


def load_configs() -> dict[str, dict]:
  """Returns stage -> key -> default, of the config files without a preset."""
  names = dict.fromkeys(name for _, stages, _ in SECTIONS for name in stages)
  modules = {name: importlib.import_module(f"configs.{name}") for name in names}
  values = {name: flatten(module.get_config()) for name, module in modules.items()}
  return {name: {k: v for k, v in keys.items() if k != "stage"} for name, keys in values.items()}


def format_value(value) -> str:
  """Returns a default as the table shows it."""
  if value is None:
    return "none"
  text = str(value).lower() if isinstance(value, bool) else str(value)
  return re.sub(r"e-0(\d)$", r"e-\1", text)


def mark_code(text: str) -> str:
  """Returns a text with names of keys, files and metrics, such as data.eval, marked as code."""
  return re.sub(r"(?<![\w./])[a-z]\w*(?:[._/][a-z]\w*)+(?![\w/])", r"`\g<0>`", text)


def format_meaning(text: str) -> str:
  """Returns a comment as a cell of a table: it begins with a small letter, and has no full stop."""
  text = re.sub(r"^[A-Z][a-z-]+(?=[ ,:;])", lambda word: word[0].lower(), text)
  return mark_code(text if ". " in text else text.removesuffix(".")).replace("|", ",")


def format_row(key: str, defaults: dict[str, object], meaning: str) -> str:
  """Returns the row of a key.

  Args:
    key: dotted.
    defaults: stage -> default; the first one is the general default.
    meaning: the comment.
  """
  general, *_ = defaults.values()
  others = {}
  for stage, value in defaults.items():
    if value != general:
      others.setdefault(format_value(value), []).append(stage)
  special = "; ".join(f"{', '.join(stages)}: {value}" for value, stages in others.items())
  default = format_value(general) + (f" ({special})" if special else "")
  return f"| `{key}` | {default} | {format_meaning(meaning)} |"


def format_tables(tables: dict[str, list[str]]) -> str:
  """Returns the tables of a section, from heading -> rows; an empty heading is not written."""
  parts = []
  for heading, rows in tables.items():
    title, _, more = heading.partition(". ")
    if title:
      parts += [f"### {title.rstrip('.')}", ""]
    if more:
      parts += [textwrap.fill(mark_code(more), 100), ""]
    parts += ["| key | default | meaning |", "|---|---|---|", *rows, ""]
  return "\n".join(parts)


def list_presets() -> str:
  """Returns a line for each stage with the names of its presets."""
  lines = []
  for stage in STAGES:
    presets = importlib.import_module(f"configs.{stage}").PRESETS
    names = ", ".join(f"`{preset}`" for preset in presets)
    lines.append(textwrap.fill(f"- `configs/{stage}.py`: {names}", 100, subsequent_indent="  "))
  return "\n".join([*lines, "- `configs/predict.py` has no presets"])


def section_keys(configs: list[dict], meanings: dict, explained: dict) -> list[str]:
  """Returns the keys that all configs of a section have, in the order of the code.

  Args:
    configs: key -> default, of each stage of the section.
    meanings: of the section's own code, whose keys come first.
    explained: key -> meaning, of earlier sections.
  """
  first, *others = configs
  keys = [key for key in first if all(key in other for other in others)]
  order = [*meanings, *(key for key in explained if key not in meanings)]
  return sorted(keys, key=lambda key: order.index(key) if key in order else len(order))


def make_page() -> str:
  """Returns the page.

  Raises:
    SystemExit: keys have no meaning; names all of them.
  """
  configs, explained, missing, seen = load_configs(), {}, [], set()
  parts = [INTRODUCTION.format(presets=list_presets())]
  for title, stages, sources in SECTIONS:
    meanings = {}
    for file, function in sources:
      meanings |= read_meanings(ROOT / file, function)
    has_headings = any(heading for _, heading in meanings.values())
    keys = section_keys([configs[stage] for stage in stages], meanings, explained)
    if not seen.isdisjoint(stages):  # an earlier section has explained what these stages share
      keys = [key for key in keys if key not in explained]
    seen.update(stages)
    groups = {key: key.rpartition(".")[0] for key in keys}
    tables: dict[str, list[str]] = {}
    for key in keys:
      meaning, heading = meanings.get(key, ("", ""))
      meaning = meaning or explained.get(key, "")
      if not meaning:
        missing.append(key)
      explained.setdefault(key, meaning)
      if not has_headings and len(set(groups.values())) > 1:
        heading = GROUPS.get(groups[key], groups[key])
      defaults = {stage: configs[stage][key] for stage in stages}
      tables.setdefault(heading, []).append(format_row(key, defaults, meaning))
    parts.append(f"## {title}\n\n{format_tables(tables)}")
  if missing:
    raise SystemExit(f"error: no comment says what these keys mean: {', '.join(missing)}")
  return "\n".join(parts)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--check", action="store_true", help="only compare, do not write")
  arguments = parser.parse_args()
  text = make_page()
  if not arguments.check:
    PAGE.write_text(text, encoding="utf-8")
    return 0
  if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
    return 0
  print(f"{PAGE} is not current; run python scripts/config_tables.py", file=sys.stderr)
  return 1


if __name__ == "__main__":
  sys.path.insert(0, str(ROOT))
  sys.exit(main())
