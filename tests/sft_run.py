"""A small run for tests: drawn pictures, records about them, and the config of the run."""

import importlib
import json
import os

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

COLORS = {"red": (220, 40, 30), "green": (30, 180, 60), "blue": (30, 60, 210)}


def conversation(*texts: str) -> list[dict]:
  """Question, answer, question, ... in LLaVA's format."""
  return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def make_records(directory: str, n: int) -> list[dict]:
  """Draws n pictures into `directory` and gives a record of each.

  Every fourth record has a second turn, every fifth no picture, every seventh also the next
  record's picture.
  """
  generator = np.random.default_rng(0)
  os.makedirs(directory, exist_ok=True)
  records = []
  for index in range(n):
    color = list(COLORS)[index % 3]
    size = (int(generator.integers(10, 30)), int(generator.integers(10, 30)), 3)
    noise = generator.integers(-30, 30, size)
    pixels = np.clip(np.array(COLORS[color]) + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(os.path.join(directory, f"{index:03d}.png"))
    images = [f"{index:03d}.png"]
    turns = ["<image>\nWhat color is it?", color]
    if index % 4 == 3:
      turns += ["Is it a cat?", "no, it is a picture"]
    if index % 5 == 4:
      images, turns[0] = [], f"Name a color: {color}"
    elif index % 7 == 6:
      images.append(f"{(index + 1) % n:03d}.png")
      turns[0] = "<image><image>\nWhat color is the first?"
    record = {"id": f"r{index}", "image": images, "conversations": conversation(*turns)}
    if not images:
      del record["image"]
    records.append(record)
  return records


def ranked(records: list[dict]) -> list[dict]:
  """The records with two to four ranked answers to their last question, the best first."""
  wrong = ("a cat", "gray as the sky", "no")
  found = []
  for number, record in enumerate(records):
    *turns, last = record["conversations"]
    answers = [last["value"], *wrong[: 1 + number % 3]]
    found.append(record | {"conversations": [*turns, last | {"value": answers}]})
  return found


def write_json(path: str, content) -> str:
  """Writes `content` as JSON; gives the path back."""
  with open(path, "w", encoding="utf-8") as file:
    json.dump(content, file)
  return str(path)


def preset(stage: str) -> ConfigDict:
  """The demo preset of a stage."""
  return importlib.import_module(f"configs.{stage}").get_config("demo")


def make_config(model: str, train: str, stage: str = "sft", **overrides) -> ConfigDict:
  """The demo preset on a model directory and a record file, in small; overrides by dotted keys."""
  config = preset(stage)
  settings = {
    "model.init_from": str(model),
    "data.train": str(train),
    "data.max_length": 192,
    "batch_size": 4,
    "num_train_epochs": 1.0,
    "log_every": 1,
    "save_every": 0,
    "optim.learning_rate": 1e-3,
    **overrides,
  }
  for key, value in settings.items():
    group, _, name = key.rpartition(".")
    holder = config[group] if group else config
    holder[name] = value
  return config


def command_line(config: ConfigDict, workdir: str, script: str = "") -> list:
  """The arguments after `python` that give a script this config, from the repository's root.

  Without one it is the stage's training script.
  """
  script, base = script or f"scripts/train_{config.stage}.py", preset(config.stage).to_dict()
  flags = [script, f"--config=configs/{config.stage}.py:demo", f"--workdir={workdir}"]
  for group, values in {"": config.to_dict(), **config.to_dict()}.items():
    if isinstance(values, dict):
      known = base[group] if group else base
      prefix = f"{group}." if group else ""
      flags += [
        f"--config.{prefix}{key}={value}"
        for key, value in values.items()
        if not isinstance(value, dict) and value != known[key]
      ]
  return flags


def read_metrics(workdir: str) -> list[dict]:
  """The lines of metrics.jsonl."""
  with open(os.path.join(workdir, "metrics.jsonl"), encoding="utf-8") as file:
    return [json.loads(line) for line in file]
