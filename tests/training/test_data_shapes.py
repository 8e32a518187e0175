"""Tests that a run's losses are the same to the last digit in whatever shape its data comes."""

import base64
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scripts import train_dpo, train_sft
from tests import sft_run, tiny_models

TIMING = "perf/"
ROLES = {"human": "user", "gpt": "assistant"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory, compile_cache):
  """A model, pictures, and 12 records about them in LLaVA's shape."""
  directory = tmp_path_factory.mktemp("shapes")
  tiny_models.make_llava(str(directory / "model"))
  records = sft_run.make_records(str(directory), 12)
  sft_run.write_json(directory / "llava.json", records)
  return directory


def trained(directory, script, name: str, cache: str) -> list[dict]:
  """Trains on a file; returns the lines of metrics.jsonl without times."""
  stage = script.__name__.rpartition("train_")[2]
  settings = {"data.cache": cache, "data.images": str(directory)}
  config = sft_run.make_config(directory / "model", directory / name, stage, **settings)
  workdir = directory / f"run_{stage}_{name}"
  script.train_and_evaluate(config, str(workdir))
  lines = sft_run.read_metrics(workdir)
  return [{key: line[key] for key in line if not key.startswith(TIMING)} for line in lines]


@pytest.fixture(scope="module")
def expected(directory, tmp_path_factory):
  """The metrics of SFT on LLaVA's own shape."""
  return trained(directory, train_sft, "llava.json", str(tmp_path_factory.mktemp("cache")))


def parts(message: dict) -> dict:
  """Returns a message in TRL's form, with typed parts."""
  text, images = message["value"], message["value"].count("<image>")
  content = [{"type": "image", "text": None}] * images
  content += [{"type": "text", "text": text.replace("<image>", "").strip()}]
  return {"role": ROLES[message["from"]], "content": content}


def embedded(directory, record: dict) -> list[dict]:
  """Returns the pictures of a record as `datasets` writes them."""
  return [
    {"bytes": (directory / path).read_bytes(), "path": path} for path in record.get("image", ())
  ]


def messages(directory, record):
  """TRL's and LLaMA-Factory's SFT shape, pictures as data URIs."""
  pictures = [
    f"data:image/png;base64,{base64.b64encode(picture['bytes']).decode()}"
    for picture in embedded(directory, record)
  ]
  return {
    "id": record["id"],
    "images": pictures,
    "messages": [parts(message) for message in record["conversations"]],
  }


def prompt_completion(directory, record):
  first, *rest = [parts(message) for message in record["conversations"]]
  return {"id": record["id"], "images": record.get("image"), "prompt": [first], "completion": rest}


def instruction(directory, record):
  *before, question, answer = [message["value"] for message in record["conversations"]]
  history = [[before[0], before[1]]] if before else []
  return {
    **{"image_path": record.get("image"), "id": record["id"], "history": history},
    **{"instruction": question, "input": "", "output": answer},
  }


def table(directory, record):
  return {
    "id": record["id"],
    "images": embedded(directory, record),
    "messages": [parts(message) for message in record["conversations"]],
  }


def write(directory, form, name: str) -> str:
  """Writes the records in another form; JSON, JSON lines, Parquet or a saved data set by name."""
  records = json.loads((directory / "llava.json").read_text())
  changed = [form(directory, record) for record in records]
  if name.endswith(".json"):
    sft_run.write_json(directory / name, changed)
  elif name.endswith(".jsonl"):
    (directory / name).write_text("".join(json.dumps(one) + "\n" for one in changed))
  elif name.endswith(".parquet"):
    pq.write_table(pa.Table.from_pylist(changed), directory / name, row_group_size=5)
  else:
    datasets.Dataset(pa.Table.from_pylist(changed)).save_to_disk(directory / name, num_shards=2)
  return name


@pytest.mark.parametrize(
  ("form", "name"),
  [
    (table, "table.parquet"),
    pytest.param(messages, "messages.json", marks=pytest.mark.slow),
    pytest.param(messages, "messages.jsonl", marks=pytest.mark.slow),
    pytest.param(prompt_completion, "prompt.json", marks=pytest.mark.slow),
    pytest.param(instruction, "instruction.json", marks=pytest.mark.slow),
    pytest.param(table, "saved", marks=pytest.mark.slow),
  ],
)
def test_sft(directory, expected, tmp_path, form, name):
  written = write(directory, form, name)
  assert trained(directory, train_sft, written, str(tmp_path)) == expected


def trl_pair(directory, record):
  *before, answer = record["conversations"]
  prompt = [parts(message) for message in before]
  return {
    "images": embedded(directory, record),
    "prompt": prompt,
    "chosen": [parts(answer)],
    "rejected": [parts({"from": "gpt", "value": "a cat"})],
  }


def conversations_pair(directory, record):
  """LLaMA-Factory's shape for ranking."""
  *before, answer = record["conversations"]
  return {
    "images": record.get("image", []),
    "conversations": before,
    "chosen": answer,
    "rejected": {"from": "gpt", "value": "a cat"},
  }


@pytest.mark.slow
@pytest.mark.parametrize(
  ("form", "name"), [(trl_pair, "trl.parquet"), (conversations_pair, "factory.json")]
)
def test_dpo(directory, tmp_path, form, name):
  records = json.loads((directory / "llava.json").read_text())
  for record in records:
    *before, answer = record["conversations"]
    record["conversations"] = [*before, {**answer, "value": [answer["value"], "a cat"]}]
  sft_run.write_json(directory / f"twin_{name}.json", records)
  twin = trained(directory, train_dpo, f"twin_{name}.json", str(tmp_path))
  written = write(directory, form, name)
  assert trained(directory, train_dpo, written, str(tmp_path)) == twin
