"""A tiny float32 LLaVA in JAX and in torch, prompts for it, and transformers' answers."""

import dataclasses

import numpy as np
import torch

from tests import parity, tiny_models
from vlalign_jax.data.encode import Example
from vlalign_jax.models import vlm

# (text tokens, images) of each prompt: several images, none, one twice; lengths differ.
PROMPTS = (
  (5, ("0.png",)),
  (9, ("1.png", "2.png")),
  (23, ()),
  (1, ()),
  (7, ("2.png", "0.png", "2.png")),
)
LENGTH, IMAGES = 48, 2


@dataclasses.dataclass(frozen=True)
class Tiny:
  directory: str
  torch_model: torch.nn.Module
  config: vlm.ModelConfig
  graphdef: object
  params: dict
  pictures: dict[str, np.ndarray]
  prompts: tuple[Example, ...]

  def batch(self, prompts=None, length: int = LENGTH, empty: int = 0):
    """Returns a batch of one prompt a row, and `empty` rows of padding."""
    prompts = self.prompts if prompts is None else prompts
    layout = [[prompt] for prompt in prompts] + [[]] * empty
    return parity.make_rows(self.config, layout, self.pictures, length, IMAGES)

  def torch_inputs(self, prompt: Example, answer=()) -> dict:
    """Returns the torch model's inputs for a prompt and an answer."""
    tokens = torch.tensor(np.concatenate([prompt.tokens, answer]))[None].long()
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if prompt.images:
      images = [self.pictures[path] for path in prompt.images]
      inputs["pixel_values"] = parity.pixel_values(self.config, images)
    return inputs

  def torch_answer(self, prompt: Example, **options) -> list[int]:
    """Returns transformers' greedy answer, including its stop token."""
    inputs = self.torch_inputs(prompt)
    tokens = self.torch_model.generate(**inputs, do_sample=False, pad_token_id=0, **options)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()

  def torch_log_probabilities(self, prompt: Example, answer) -> np.ndarray:
    """Returns float32[M, V], each after the prompt and the answer's tokens before."""
    with torch.no_grad():
      logits = self.torch_model(**self.torch_inputs(prompt, answer)).logits[0]
    return torch.log_softmax(logits[len(prompt.tokens) - 1 : -1], dim=-1).numpy()


def make_prompts(config: vlm.ModelConfig) -> tuple[Example, ...]:
  return tuple(
    parity.make_example(config, length, images, seed)
    for seed, (length, images) in enumerate(PROMPTS)
  )


def make(directory: str, **options) -> Tiny:
  """Writes a LLaVA directory; `options` are of `tiny_models.make_llava`."""
  torch_model = tiny_models.make_llava(directory, **options)
  torch_model.generation_config.eos_token_id = None  # each test sets its stop tokens
  opened, graphdef, params = parity.open_model(directory)
  config = opened.config
  pictures = parity.make_pictures(3, config.vision.image_size)
  return Tiny(directory, torch_model, config, graphdef, params, pictures, make_prompts(config))
