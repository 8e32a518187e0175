"""What the tests of imported, assembled and exported models share."""

import logging
from typing import Any

import numpy as np
import torch
import transformers

from tests import parity
from vlalign_jax import trees


def assert_same_bits(first, second):
  first, second = trees.flatten(first), trees.flatten(second)
  assert first.keys() == second.keys()
  for path, array in first.items():
    assert array.dtype == second[path].dtype
    np.testing.assert_array_equal(array, second[path], err_msg=path)


def load_in_torch(directory: str, kind: Any = transformers.LlavaForConditionalGeneration):
  """Returns a model of a class of transformers; fails if weights are missing or loading warns."""
  warnings = []
  handler = logging.Handler(logging.WARNING)
  handler.emit = lambda record: warnings.append(record.getMessage())
  logger = logging.getLogger("transformers")
  logger.addHandler(handler)
  try:
    model, info = kind.from_pretrained(directory, output_loading_info=True)
  finally:
    logger.removeHandler(handler)
  assert not any(info.values()), info
  assert not warnings
  return model.eval()


def example_of(config):
  """Returns (an example with two images, pictures)."""
  pictures = parity.make_pictures(2, config.vision.image_size)
  return parity.make_example(config, 20, tuple(pictures)), pictures


def torch_logits(model, config):
  with torch.no_grad():
    return parity.torch_logits(model, config, *example_of(config)).numpy()


def our_logits(config, graphdef, params):
  example, pictures = example_of(config)
  rows = parity.make_rows(config, [[example]], pictures, len(example.tokens), 2)
  return parity.logits(graphdef, params, rows)[0]
