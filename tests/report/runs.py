"""Run directories for reports, written by hand."""

import json
import pathlib

from PIL import Image

from vlalign_jax import stages
from vlalign_jax.prediction import settings


def write(directory: pathlib.Path, config, **files: list[dict] | dict) -> pathlib.Path:
  """Makes a directory with a config.json and other files, such as `metrics_jsonl=[...]`."""
  directory.mkdir(parents=True)
  (directory / "config.json").write_text(json.dumps(config.to_dict()))
  for name, content in files.items():
    path = directory / name.replace("_", ".")
    if isinstance(content, list):
      path.write_text("".join(json.dumps(line) + "\n" for line in content))
    else:
      path.write_text(json.dumps(content))
  return directory


def train(directory: pathlib.Path, stage: str, lines: list[dict], rollouts=(), **keys):
  """Makes the directory of a training run; keys have `__` in place of their dots."""
  config = stages.defaults(stage)
  for key, value in keys.items():
    group, _, name = key.rpartition("__")
    (config[group] if group else config)[name] = value
  files = {"rollouts_jsonl": list(rollouts)} if rollouts else {}
  return write(directory, config, metrics_jsonl=lines, **files)


def predict(directory: pathlib.Path, lines: list[dict], numbers: dict, images: pathlib.Path):
  """Makes the directory of a prediction."""
  config = settings.defaults()
  config.model.init_from, config.data.eval = "runs/sft", str(images / "eval.json")
  return write(directory, config, predictions_jsonl=lines, metrics_json=numbers)


def picture(directory: pathlib.Path, name: str) -> str:
  """Draws a picture and returns its name."""
  directory.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (8, 6), "red").save(directory / name)
  return name


def answer(record: int, images: list[str], text: str, **values) -> dict:
  """Returns a line of rollouts.jsonl or predictions.jsonl."""
  shown = {"record": record, "id": f"r{record}", "images": images, "prompt": "<image>What?"}
  return values | shown | {"sample": 0, "answer": text}
