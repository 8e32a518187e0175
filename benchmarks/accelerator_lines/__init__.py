"""The lines of benchmarks/accelerator.py, in the order in which they run."""

import dataclasses
import importlib
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Line:
  """A generator function `(settings) -> dicts` and how it runs.

  Attributes:
    path: module:function, imported only where it runs.
    limit: seconds after which it is stopped.
    environment: variables of its process.
    usual: whether it runs without being named.
  """

  path: str
  limit: float = 120
  environment: dict = dataclasses.field(default_factory=dict)
  usual: bool = True

  def load(self) -> Callable:
    """Imports the function."""
    module, _, name = self.path.partition(":")
    return getattr(importlib.import_module(f"accelerator_lines.{module}"), name)


LINES = {
  "device": Line("products:device", 60),
  "product": Line("products:product", 60),
  "attention": Line("attention:decoder", 150),
  "tower": Line("attention:tower", 60),
  "torch_attention": Line("torch_side:attention", 60),
  "head": Line("products:head", 60),
  "sft": Line("training:sft", 180),
  "lora": Line("training:lora", 150),
  "decode": Line("sampling:decode", 120),
  "dpo": Line("training:dpo", 180),
  "numerics": Line("numerics:compare", 120),
  "ppo": Line("sampling:ppo", 180),
  "versus": Line("versus:compare", 180, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"}),
  "variants": Line("training:variants", 240, usual=False),
  "profile": Line("training:profile", 150, usual=False),
}
