"""README's table of keys against what a config file gives without a preset, key by key."""

import importlib
import pathlib
import re

import pytest
from ml_collections import ConfigDict

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
STAGES = ("sft", "reward", "dpo", "ppo")
# Keys that are explained elsewhere: each stage's own name, and PPO's in vlalign_jax/config_ppo.py.
ELSEWHERE = ("stage", "ppo.")
WORDS = {
  "": "",
  "all": "",
  "once": "",
  "the file's directory": "",
  "true": True,
  "false": False,
  "as language": None,
  "the base rate": None,
}


def flatten(config: ConfigDict, prefix: str = "") -> dict:
  """Dotted key -> value."""
  found = {}
  for key, value in config.items():
    is_group = isinstance(value, ConfigDict)
    found |= flatten(value, f"{prefix}{key}.") if is_group else {f"{prefix}{key}": value}
  return found


def bare(stage: str) -> dict:
  """What `--config=configs/STAGE.py` gives."""
  return flatten(importlib.import_module(f"configs.{stage}").get_config())


def as_value(text: str):
  """The value that a cell of the table means."""
  if text in WORDS:
    return WORDS[text]
  try:
    return float(text)
  except ValueError:
    return text


def table() -> dict[str, dict]:
  """Key -> stage -> default, of cells such as `10 (ppo: 1), 0`: a value for each key of the row."""
  lines = README.split("| key | default | meaning |\n|---|---|---|\n")[1].split("\n\n")[0]
  found = {}
  for line in lines.splitlines():
    keys, defaults, _ = re.fullmatch(r"\| (.*?) \|(.*?)\|(.*)\|", line).groups()
    keys = re.findall(r"`([^`]*)`", keys)
    values = re.split(r",(?![^(]*\))", defaults)
    values = [""] * len(keys) if not defaults.strip() else values
    for key, value in zip(keys, values, strict=True):
      general, _, special = value.strip().partition(" (")
      found[key] = dict.fromkeys(STAGES, as_value(general))
      for stages, other in re.findall(r"((?:\w+, )*\w+): ([^,)]+)", special):
        found[key] |= dict.fromkeys(stages.split(", "), as_value(other))
  return found


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_are_those_of_a_config_without_a_preset(stage):
  given = {k: v for k, v in bare(stage).items() if not k.startswith(ELSEWHERE)}
  written = {key: of[stage] for key, of in table().items()}
  assert given.keys() <= written.keys()
  shown = {key: as_value(v) if isinstance(v, str) else v for key, v in given.items()}
  # A bool of one is no number of the other.
  assert {key: (type(v) is bool, v) for key, v in shown.items()} == {
    key: (type(written[key]) is bool, written[key]) for key in given
  }


def test_no_key_of_the_table_is_unknown():
  known = set().union(*map(bare, STAGES))
  assert len(table()) > 60
  assert table().keys() <= known


def test_presets_are_listed():
  """`configs/sft.py:demo`, `:llava15_pretrain`, ...; `configs/ppo.py` those and `:rloo`, ..."""
  text = README.split("\n## Configuration\n")[1].split("\n| key")[0]
  of_sft, rest = text.split("`configs/reward.py`")
  of_pairs, of_ppo = rest.split("`configs/ppo.py` those and")
  of_ppo = of_ppo.split(")")[0]
  names = lambda part: re.findall(r":(\w+)`", part)  # noqa: E731
  presets = {stage: list(importlib.import_module(f"configs.{stage}").PRESETS) for stage in STAGES}
  assert names(of_sft) == presets["sft"]
  assert names(of_pairs) == presets["reward"] == presets["dpo"]
  assert names(of_pairs) + names(of_ppo) == presets["ppo"]
