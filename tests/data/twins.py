"""Records in the shapes of other tools, and how they are compared with their twins in LLaVA's."""

import base64
import json

import numpy as np

from tests import tiny_models
from vlalign_jax.data.images import open_image
from vlalign_jax.data.picture_tokens import OneTile
from vlalign_jax.data.records import Options, load_records


def human(value="<image>\nWhat?"):
  return {"from": "human", "value": value}


def gpt(value="teal"):
  return {"from": "gpt", "value": value}


def user(content="<image>\nWhat?"):
  return {"role": "user", "content": content}


def assistant(content="teal"):
  return {"role": "assistant", "content": content}


def text(words):
  return {"type": "text", "text": words}


SYSTEM = {"role": "system", "content": "Be brief."}
IMAGE = {"type": "image"}


def llava(*messages, image="a.png", **fields):
  """Returns a record in LLaVA's shape; without messages a question and its answer."""
  return {"image": image, "conversations": list(messages or (human(), gpt())), **fields}


ONE, PAIR = llava(), llava(human(), gpt(["teal", "rust"]))
TWO_TURNS = llava(human(), gpt(), human("Bright?"), gpt("no"))
PICTURE = {"image": "a.png"}


def read(directory, entry, answers="one", name="train.json", **options):
  (directory / name).write_text(json.dumps([entry]))
  (record,) = load_records(
    str(directory / name), Options("", answers, cache=str(directory / "cache"), **options)
  )
  return record


def assert_equal(record, twin, encoder):
  """Compares what a model gets of two records: tokens and pictures."""
  assert (record.answers, record.system) == (twin.answers, twin.system)
  tokenizer = tiny_models.make_tokenizer()
  image_token = tokenizer.convert_tokens_to_ids("<image>")
  mine, theirs = (
    encoder(one, "vicuna", tokenizer, OneTile(image_token, 9), 500).example
    for one in (record, twin)
  )
  for name in ("tokens", "positions", "branches", "targets", "loss_mask", "answers"):
    np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
  assert np.sum(mine.loss_mask)
  for one, other in zip(record.image_files, twin.image_files, strict=True):
    np.testing.assert_array_equal(np.asarray(open_image(one)), np.asarray(open_image(other)))


def encoded(content: bytes) -> str:
  return base64.b64encode(content).decode()
