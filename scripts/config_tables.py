"""Writes docs/configuration.md: every key with its defaults and its meaning.

python scripts/config_tables.py [--check]

A meaning is the comment at the line of the code that sets a key's default, or the one above it.
With --check nothing is written, and the exit code is 1 if the page is not current.
"""

import argparse
import importlib
import io
import pathlib
import re
import sys
import tokenize

from ml_collections import ConfigDict

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"
STAGES = ("sft", "reward", "dpo", "ppo")
# Section -> (file that sets the defaults, config files that have the keys).
SECTIONS = {
  "All training stages": ("vlalign_jax/config.py", STAGES),
  "Reward models": ("vlalign_jax/stages/reward.py", ("reward",)),
  "DPO": ("vlalign_jax/stages/dpo.py", ("dpo",)),
  "PPO": ("vlalign_jax/stages/ppo.py", ("ppo",)),
  "Prediction": ("vlalign_jax/prediction/settings.py", ("predict",)),
}
INTRODUCTION = """# Configuration

A run is described by a config file with a preset and any number of keys after it:

    python scripts/train_sft.py --config=configs/sft.py:llava15_7b --workdir=runs/sft \\
      --config.data.train=train.json --config.optim.learning_rate=1e-5

Presets are listed, with what to expect of them, at the top of `configs/STAGE.py`; what a preset
sets is in its `get_config`. The defaults below are those of a config file without a preset, which
is the preset `llava15_7b`. Where a stage has another default than the first one, it stands in
brackets. "none" is an empty value. The installed commands (`vlalign-train-sft` and so on) take the
same flags.

**`batch_size` is the number of examples of an update, over all devices. `grad_accumulation` splits
it into micro-batches; it does not multiply it, as it does in transformers and TRL.**

This page is written by `python scripts/config_tables.py` from the comments in the code.
"""


def meanings(file: str) -> dict[str, str]:
  """Returns key -> meaning, from the comments of the lines that set a config's keys."""
  lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
  comments = {}
  text = "\n".join(lines) + "\n"
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type == tokenize.COMMENT:
      comments[token.start[0]] = token.string.lstrip("# ")
  found, above, in_heading = {}, [], False
  for number, line in enumerate(lines, start=1):
    if line.strip().startswith("#"):
      in_heading = in_heading or line.strip().startswith("# ---")
      above = [] if in_heading else [*above, comments[number]]
      continue
    in_heading = False
    if match := re.match(r"\s+(?:c\.)?([a-z_]\w*(?:\.\w+)*) = ", line):
      words = [*above, comments.get(number, "")]
      found[match[1]] = " ".join(word for word in words if word)
    above = []
  return found


def flatten(config: ConfigDict, prefix: str = "") -> dict:
  """Returns dotted key -> value."""
  values = {}
  for key in config:
    if isinstance(config[key], ConfigDict):
      values |= flatten(config[key], f"{prefix}{key}.")
    else:
      values[f"{prefix}{key}"] = config[key]
  return values


def shown(value) -> str:
  """Returns a default as the table shows it."""
  if value is None:
    return "none"
  return str(value).lower() if isinstance(value, bool) else str(value)


def row(key: str, values: dict, meaning: str) -> str:
  """Returns the line of a key; `values` maps config file -> default."""
  first, *_ = values.values()
  others = {}
  for name, value in values.items():
    if value != first:
      others.setdefault(shown(value), []).append(name)
  special = "; ".join(f"{', '.join(names)}: {value}" for value, names in others.items())
  default = shown(first) + (f" ({special})" if special else "")
  return f"| `{key}` | {default} | {meaning.replace('|', ',')} |"


def page() -> str:
  """Returns the page.

  Raises:
    SystemExit: a key has no meaning; names all of them.
  """
  configs = {
    name: flatten(importlib.import_module(f"configs.{name}").get_config())
    for name in (*STAGES, "predict")
  }
  explained, parts, without = {}, [INTRODUCTION], []
  for title, (file, names) in SECTIONS.items():
    comments = meanings(file)
    parts.append(f"## {title}\n\n| key | default | meaning |\n|---|---|---|")
    known = [*comments, *explained]  # keys are shown in the order of the code
    place = lambda key: known.index(key) if key in known else len(known)  # noqa: E731, B023
    for key in sorted(configs[names[0]], key=place):
      shared = key in explained and key not in comments
      if key == "stage" or (key in explained and title != "Prediction"):
        continue
      if not (key in comments or shared):
        if title == "All training stages":
          continue  # a stage's own key, in a later section
        without.append(key)
        continue
      meaning = comments.get(key) or explained.get(key, "")
      if not meaning:
        without.append(key)
      explained.setdefault(key, meaning)
      parts.append(row(key, {name: configs[name][key] for name in names}, meaning))
    parts.append("")
  if without:
    raise SystemExit(f"error: no comment says what these keys mean: {', '.join(without)}")
  return "\n".join(parts)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--check", action="store_true", help="only compare, do not write")
  arguments = parser.parse_args()
  text = page()
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
