"""Alignment of vision-language models (vision tower + projector + language model) in JAX."""

import logging


def _is_not_about_torch(record: logging.LogRecord) -> bool:
  """Drops what transformers says when it is imported without PyTorch, which nothing here needs."""
  return not record.getMessage().startswith("PyTorch was not found")


logging.getLogger("transformers").addFilter(_is_not_about_torch)
