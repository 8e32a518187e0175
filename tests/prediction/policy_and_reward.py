"""A tiny policy and a tiny reward model, in torch and as directories, and records for them."""

import dataclasses
import json
import os

import numpy as np
import torch
from ml_collections import ConfigDict
from PIL import Image
from safetensors.torch import load_file, save_file

from configs import predict
from tests import parity, tiny_models
from vlalign_jax.data import images
from vlalign_jax.data.encode import encode
from vlalign_jax.data.records import Record
from vlalign_jax.weights import source


def _turns(*texts) -> list[dict]:
  return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


LONG = "a long answer that takes much of a row and some of another one"
QUESTION = "<image>\nIs it red?\nOptions: (A) yes (B) no"
RECORDS = (
  {"id": "one", "image": "0.png", "conversations": _turns(QUESTION, "The answer is B: no")},
  {"id": "text", "conversations": _turns("Say a word", "word")},
  {
    "id": "ranked",
    "image": ["1.png", "0.png"],
    "conversations": _turns("<image><image>\nWhich?", ["the first", "", "both <b>"]),
  },
  {
    "id": "turns",
    "image": "1.png",
    "conversations": _turns("<image>\nWhat is it?", "A thing.", "Which?", "That one over there"),
  },
  {"prompt": "Good?", "chosen": "Yes, very.", "rejected": "No", "id": "pair"},
  {"id": "apart", "conversations": _turns("Tell", [f"{n} {LONG}" for n in range(4)])},
)


@dataclasses.dataclass(frozen=True)
class Tiny:
  directory: str
  policy: torch.nn.Module
  scorer: torch.nn.Module  # its language head is not used
  kernel: torch.Tensor  # float32[D]
  opened: source.ModelSource  # the policy; the reward model has its tokenizer and image processor

  @property
  def data(self) -> str:
    return os.path.join(self.directory, "records.json")

  def config(self, **overrides) -> ConfigDict:
    """Returns a config of prediction with the policy in float32, with dotted keys overridden."""
    config = predict.get_config()
    settings = {
      "model.init_from": f"{self.directory}/policy",
      "model.dtype": "float32",
      "data.eval": self.data,
      "data.max_length": 192,
      "batch_size": 4,
      "generation.max_new_tokens": 6,
      **overrides,
    }
    for key, value in settings.items():
      group, _, name = key.rpartition(".")
      (config[group] if group else config)[name] = value
    return config

  def example(self, record: Record, answer: str):
    """Returns the record with this answer as SFT encodes it, without a limit of length."""
    *before, last = record.turns
    record = dataclasses.replace(
      record, turns=(*before, dataclasses.replace(last, gpt=answer)), answers=()
    )
    opened = self.opened
    return encode(record, "vicuna", opened.tokenizer, opened.layout, 10_000).example

  def inputs(self, example) -> dict:
    """Returns the torch models' inputs for an example."""
    arrays = [
      self.opened.images.preprocess(images.open_image(os.path.join(self.directory, path)))
      for path in example.images
    ]
    pixels = parity.pixel_values(self.opened.config, arrays) if arrays else None
    return {"input_ids": torch.tensor(example.tokens)[None].long(), "pixel_values": pixels}

  def torch_log_probabilities(self, record: Record, answer: str) -> np.ndarray:
    """Returns float32[M], of the last answer's tokens and its end."""
    example = self.example(record, answer)
    with torch.no_grad():
      logps = torch.log_softmax(self.policy(**self.inputs(example)).logits[0], dim=-1)
    logps = logps.gather(1, torch.tensor(example.targets)[:, None].long())[:, 0].numpy()
    # The tokens of the last answer come after the last gap.
    indices = np.flatnonzero(example.loss_mask)
    gaps = np.flatnonzero(np.diff(indices) > 1)
    return logps[indices[gaps[-1] + 1 if len(gaps) else 0 :]]

  def torch_score(self, record: Record, answer: str) -> float:
    """Returns the last token's hidden state times the score weights."""
    with torch.no_grad():
      hidden = self.scorer.model(**self.inputs(self.example(record, answer))).last_hidden_state
    return float(hidden[0, -1] @ self.kernel)


def make(directory: str) -> Tiny:
  policy = tiny_models.make_llava(f"{directory}/policy")
  scorer, kernel = make_reward_model(f"{directory}/reward")
  rng = np.random.default_rng(0)
  for n in range(2):
    picture = rng.integers(0, 256, (20 + 7 * n, 24, 3), np.uint8)
    Image.fromarray(picture).save(f"{directory}/{n}.png")
  with open(f"{directory}/records.json", "w", encoding="utf-8") as file:
    json.dump(RECORDS, file)
  opened = source.open_source(parity.model_group(init_from=f"{directory}/policy"))
  return Tiny(directory, policy, scorer, kernel, opened)


def make_reward_model(directory: str, seed: int = 5, **overrides):
  """Writes a directory as `weights.export` does, and returns (torch model, score weights)."""
  model = tiny_models.make_llava(directory, seed=seed, **overrides)
  path = os.path.join(directory, "model.safetensors")
  tensors = {name: tensor for name, tensor in load_file(path).items() if "lm_head" not in name}
  generator = torch.Generator().manual_seed(seed)
  kernel = torch.randn(model.config.text_config.hidden_size, generator=generator)
  save_file(tensors | {"score.weight": kernel[None]}, path, metadata={"format": "pt"})
  config = os.path.join(directory, "config.json")
  with open(config, encoding="utf-8") as file:
    content = json.load(file) | {"architectures": ["LlavaForSequenceClassification"]}
  with open(config, "w", encoding="utf-8") as file:
    json.dump(content, file)
  return model, kernel


def forbid(monkeypatch) -> None:
  """Makes loading any weights an error."""

  def refuse(*_):
    raise AssertionError("weights are loaded")

  monkeypatch.setattr("vlalign_jax.prediction.models.load_model", refuse)
