"""Tiny random models whose pictures are several tiles, in JAX and in torch, with records for them.

Everything on the torch side comes from transformers' own processor of the model, which reads the
exported or published files. No weight has a special value, and no picture is a square.
"""

import dataclasses
import os
import unittest.mock
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
  LlavaNextImageProcessorPil,
)
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests import parity, tiny_models
from tests.data.processors import noise
from vlalign_jax.data import encode, images
from vlalign_jax.data.conversations import Turn
from vlalign_jax.data.encode import Example
from vlalign_jax.data.records import Record
from vlalign_jax.data.rows import build_row
from vlalign_jax.data.tokens import picture_token
from vlalign_jax.input_pipeline import prompts
from vlalign_jax.weights.source import ModelSource

TEMPLATE = "vicuna"
SIZES = {"wide.png": (37, 11), "tall.png": (9, 41), "near.png": (25, 23), "line.png": (50, 1)}
WORDS = ("what", "is", "in", "the", "red", "picture", "on", "left", "?", "über", "12", "cat,")


def make_llava_next(directory: str, *, seed: int = 0, text: dict | None = None, **overrides):
  """Writes a LLaVA-NeXT directory and returns the torch model; see `tiny_models.make_llava`."""
  tokenizer = tiny_models.make_tokenizer()
  vision = tiny_models.vision_config(**overrides.pop("vision", {}))
  side = vision.image_size
  grids = ([1, 2], [2, 1], [2, 2], [3, 1], [1, 3])
  pinpoints = [[rows * side, columns * side] for rows, columns in grids]
  settings: Any = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>"), **overrides}
  config = transformers.LlavaNextConfig(
    vision_config=vision,
    text_config=tiny_models.text_config(tokenizer, **(text or {})),
    image_grid_pinpoints=pinpoints,
    **settings,
  )
  model = transformers.LlavaNextForConditionalGeneration(config).eval()
  tiny_models.randomise(model, seed)
  images = LlavaNextImageProcessorPil(
    size={"shortest_edge": side},
    crop_size={"height": side, "width": side},
    image_grid_pinpoints=pinpoints,
  )
  processor = transformers.LlavaNextProcessor(
    images,
    tokenizer,
    patch_size=vision.patch_size,
    vision_feature_select_strategy=config.vision_feature_select_strategy,
    num_additional_image_tokens=int(vision.model_type == "clip_vision_model"),
  )
  return _save(directory, model, processor)


class InternVLProcessor(transformers.InternVLProcessor):
  """The processor of pictures and text alone: that of videos needs torchvision."""

  @classmethod
  def get_attributes(cls):
    return ["image_processor", "tokenizer"]


def make_internvl(directory: str, *, seed: int = 0, text: dict, vision: dict, **overrides):
  """Writes an InternVL directory and returns the torch model; see `tiny_models.make_llava`."""
  extra = {"start_image_token": "<img>", "end_image_token": "</img>"}
  extra |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
  tokenizer = tiny_models.make_tokenizer(image_token=False, extra_special_tokens=extra)
  sizes: Any = {"image_size": 16, "patch_size": 4, "num_attention_heads": 2, **vision}
  sizes |= {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
  vision_config = transformers.InternVLVisionConfig(**sizes)
  settings: Any = {"image_token_id": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), **overrides}
  config = transformers.InternVLConfig(
    vision_config=vision_config,
    text_config=tiny_models.text_config(tokenizer, **text),
    image_seq_length=4,
    tie_word_embeddings=False,
    **settings,
  )
  model = transformers.InternVLForConditionalGeneration(config).eval()
  tiny_models.randomise(model, seed)
  images = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, min_patches=1, max_patches=6)
  processor = InternVLProcessor(images, tokenizer, image_seq_length=4)
  return _save(directory, model, processor)


def make_idefics3(
  directory: str, *, seed: int = 0, name: str = "Idefics3", splits: bool = True, **overrides
):
  """Writes an Idefics3 or SmolVLM directory and returns the torch model."""
  places = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
  tokenizer = tiny_models.make_tokenizer()
  tokenizer.add_tokens(["<fake_token_around_image>", "<global-img>", *places], special_tokens=True)
  tokenizer.add_tokens(["<end_of_utterance>"], special_tokens=True)
  vision: Any = {"image_size": 12, "patch_size": 3, "hidden_size": 24, "intermediate_size": 40}
  vision |= {
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "model_type": f"{name.lower()}_vision",
  }
  config = getattr(transformers, f"{name}Config")(
    vision_config=vision,
    text_config=tiny_models.text_config(tokenizer, **{"vocab_size": 544, **overrides}).to_dict(),
    image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    scale_factor=2,
  )
  model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
  tiny_models.randomise(model, seed)
  kinds = {"Idefics3": Idefics3ImageProcessorPil, "SmolVLM": SmolVLMImageProcessorPil}
  images = kinds[name](
    size={"longest_edge": 36}, max_image_size={"longest_edge": 12}, do_image_splitting=splits
  )
  kind = {"Idefics3": transformers.Idefics3Processor, "SmolVLM": SmolVLMProcessor}[name]
  return _save(directory, model, kind(images, tokenizer, image_seq_len=4))


class SmolVLMProcessor(transformers.SmolVLMProcessor):
  """The processor of pictures and text alone: that of videos needs torchvision and num2words."""

  def __init__(self, image_processor=None, tokenizer=None, image_seq_len=169, chat_template=None):
    with unittest.mock.patch.object(processing_smolvlm, "num2words", str):
      super().__init__(image_processor, tokenizer, None, image_seq_len, chat_template)

  @classmethod
  def get_attributes(cls):
    return ["image_processor", "tokenizer"]


def _save(directory: str, model, processor):
  model.save_pretrained(directory)
  processor.save_pretrained(directory)
  return model


# Name -> function of a directory that writes the model there and returns it in torch.
MODELS = {
  "llava_next": lambda directory, **options: make_llava_next(
    directory, text={"attention_bias": True}, **options
  ),
  "internvl": lambda directory, **options: make_internvl(
    directory,
    text=tiny_models.QWEN2_WINDOW | {"use_sliding_window": False},
    vision={"attention_bias": True},
    **options,
  ),
  "internvl_qwen3": lambda directory, **options: make_internvl(
    directory,
    text={"model_type": "qwen3"},
    vision={"use_qk_norm": True, "norm_type": "rms_norm"},
    **options,
  ),
  "idefics3": make_idefics3,
  "smolvlm": lambda directory, **options: make_idefics3(directory, name="SmolVLM", **options),
}


# Models that share nearly everything with another: the costliest tests of these are marked slow.
VARIANTS = ("internvl_qwen3", "idefics3")
COSTLY = [
  pytest.param(name, marks=pytest.mark.slow) if name in VARIANTS else name for name in MODELS
]

# Name -> class in transformers that opens the processor of a directory; default: AutoProcessor.
PROCESSORS = {
  "internvl": InternVLProcessor,
  "internvl_qwen3": InternVLProcessor,
  "smolvlm": SmolVLMProcessor,
}


@dataclasses.dataclass(frozen=True)
class Tiled:
  """A model in both frameworks.

  Attributes:
    name: in MODELS.
    directory: of the model; pictures are in its `pictures`.
    torch_model: in evaluation mode.
    processor: transformers' processor of the directory.
    source, graphdef, params: our model.
  """

  name: str
  directory: str
  torch_model: torch.nn.Module
  processor: transformers.ProcessorMixin
  source: ModelSource
  graphdef: object
  params: dict

  @property
  def config(self):
    return self.source.config

  @property
  def root(self) -> str:
    return os.path.join(self.directory, "pictures")

  def record(self, question: str, answer: str | None = None, *pictures: str) -> Record:
    """Returns a record whose question begins with the pictures, or has <image> where they are."""
    if "<image>" not in question:
      question = "<image>\n" * len(pictures) + question
    return Record("t.json", 0, "x", pictures, (Turn(question, answer),), root=self.root)

  def encoded(self, record: Record) -> Example:
    """Returns the example of a record, or the prompt of one without an answer."""
    function = encode.encode if record.turns[-1].gpt else prompts.encode_prompt
    arguments = record, TEMPLATE, self.source.tokenizer, self.source.layout, 10_000
    example = function(*arguments).example
    assert example is not None
    return example

  def rows(self, layout, tiles: int | None = None) -> dict[str, np.ndarray]:
    """Returns a batch; `layout` lists the examples of each row, `tiles` is the room for tiles."""
    config, preprocessor = self.config, self.source.images
    length = max(sum(len(example.tokens) for example in row) for row in layout) + 3
    most = max(sum({k: n for e in row for k, n in e.tiles.items()}.values()) for row in layout)
    tiles = most + 1 if tiles is None else tiles
    pixels = np.zeros((len(layout), tiles, preprocessor.height, preprocessor.width, 3), np.uint8)
    arrays = []
    for b, examples in enumerate(layout):
      options = length, tiles, config.image_token_id, config.tokens_per_image
      row, paths = build_row(examples, *options)
      arrays.append(row)
      if paths:
        shown = np.concatenate([preprocessor.tiles(self.picture(path)) for path in paths])
        pixels[b, : len(shown)] = shown
    stacked = {name: np.stack([row[name] for row in arrays]) for name in arrays[0]}
    return stacked | {"images": pixels}

  def picture(self, path: str):
    return images.open_image(os.path.join(self.root, path))

  def torch_inputs(self, example: Example) -> dict[str, torch.Tensor]:
    """Returns the torch model's inputs for an example without branches."""
    tokens = torch.tensor(example.tokens)[None].long()
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if example.images:
      pictures = [self.picture(path) for path in example.images]
      options = self.processor.images_kwargs
      inputs |= self.processor.image_processor(pictures, return_tensors="pt", **options)
      for name in ("num_patches", "rows", "cols"):
        inputs.pop(name, None)
    return inputs

  def torch_logits(self, example: Example, model=None) -> torch.Tensor:
    """Returns float32[N, V]."""
    return (model or self.torch_model)(**self.torch_inputs(example)).logits[0]

  def torch_loss(self, examples):
    """Returns (mean cross-entropy over the learned tokens of all examples, their number)."""
    total, count = 0.0, 0
    for example in examples:
      targets, mask = torch.tensor(example.targets).long(), torch.tensor(example.loss_mask)
      losses = torch.nn.functional.cross_entropy(
        self.torch_logits(example), targets, reduction="none"
      )
      total, count = total + (losses * mask).sum(), count + int(example.loss_mask.sum())
    return total / count, count


def make(name: str, directory, **options) -> Tiled:
  """Writes the model of MODELS, and pictures of all SIZES; opens both."""
  directory = str(directory)
  torch_model = MODELS[name](directory, **options)
  root = os.path.join(directory, "pictures")
  os.makedirs(root)
  for seed, (path, size) in enumerate(SIZES.items()):
    noise(*size, seed).save(os.path.join(root, path))
  return Tiled(
    name, directory, torch_model, open_processor(name, directory), *parity.open_model(directory)
  )


def open_processor(name: str, directory: str):
  """Returns transformers' processor of the directory of a model of MODELS."""
  return PROCESSORS.get(name, transformers.AutoProcessor).from_pretrained(directory)


def words(seed: int, count: int) -> str:
  return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def records(model: Tiled) -> list[Record]:
  """Returns records with no picture, one, several of other shapes, and one picture twice."""
  shown = [(), ("wide.png",), ("tall.png", "near.png", "wide.png"), (), ("line.png", "line.png")]
  return [
    model.record(words(seed, 4 + seed), words(seed + 10, 3 + seed), *pictures)
    for seed, pictures in enumerate(shown)
  ]


def layout_of(examples) -> list[list[Example]]:
  """Returns rows of several examples, and one of padding."""
  return [examples[:3], examples[3:], []]


def as_typed(model: Tiled, text: str) -> str:
  """Returns a prompt as transformers' processor of the model takes it."""
  return text.replace("<image>", picture_token(model.source.tokenizer))


# Modules of the language model's linear maps, and of each model's projector, in transformers.
PEFT_LANGUAGE = r".*(language_model|text_model)\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
PEFT_PROJECTOR = dict.fromkeys(MODELS, "multi_modal_projector")
PEFT_PROJECTOR |= {"idefics3": "modality_projection", "smolvlm": "modality_projection"}

# Parts of names of tensors that are never run.
UNUSED = ("vision_tower.encoder.layers.2.", "vision_tower.post_layernorm")
