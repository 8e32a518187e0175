"""Prompts and tiles of models that cut pictures equal those of transformers' processors."""

import copy

import numpy as np
import pytest
from transformers.models.smolvlm import processing_smolvlm

from tests import parity, tiled_models
from tests.data.processors import noise
from vlalign_jax.data import encode, jinja_template, templates
from vlalign_jax.input_pipeline import prompts

PROMPTS = 50


@pytest.fixture(scope="module", params=tiled_models.MODELS)
def model(request, tmp_path_factory):
  return tiled_models.make(request.param, tmp_path_factory.mktemp(request.param) / "model")


def draw_prompt(model, seed: int):
  """Returns a record of random words with up to three new pictures of any shape between them."""
  rng = np.random.default_rng(seed)
  shown = [f"drawn{seed}_{number}.png" for number in range(rng.integers(0, 4))]
  for path in shown:
    width, height = (int(2 ** rng.uniform(0, 7)) for _ in range(2))
    noise(width, height, seed).save(f"{model.root}/{path}")
  places = [*rng.choice(tiled_models.WORDS, rng.integers(1, 12)), *["<image>"] * len(shown)]
  rng.shuffle(places)
  return model.record(" ".join(places), None, *shown)


def test_prompts_and_pixels_equal_the_processors(model):
  tokenizer, layout = model.source.tokenizer, model.source.layout
  tiles = set()
  for seed in range(PROMPTS):
    record = draw_prompt(model, seed)
    pieces = templates.turn_pieces(
      record.turns, tiled_models.TEMPLATE, tokenizer, record.where, record.system
    )
    pictures = [model.picture(path) for path in record.images]
    text = "".join(piece.text for piece in pieces if not piece.learn)
    processed = model.processor(
      images=pictures or None, text=tiled_models.as_typed(model, text), return_tensors="np"
    )
    example = model.encoded(record)
    assert processed["input_ids"][0].tolist() == example.tokens.tolist(), record
    for picture, tokens in zip(pictures, example.pictures, strict=True):
      ours = model.source.images.tiles(picture)
      assert len(ours) == tokens.tiles <= layout.most_tiles
      options = model.processor.images_kwargs
      theirs = model.processor.image_processor([picture], return_tensors="np", **options)
      theirs = theirs["pixel_values"]
      theirs = theirs.reshape(-1, *theirs.shape[-3:])
      found = parity.pixel_values(model.config, ours).numpy()
      np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-6)
      tiles.add(tokens.tiles)
  assert max(tiles) == layout.most_tiles
  assert len(tiles) > 2


def test_every_embedding_stands_once(model):
  """Each token has its own embedding, in order; embeddings of borders stand nowhere."""
  P = model.config.tokens_per_image
  for seed in range(200):
    rng = np.random.default_rng(seed)
    width, height = (int(2 ** rng.uniform(0, 8)) for _ in range(2))
    tokens = model.source.layout.tokens_of((width, height))
    slots = tokens.slots[tokens.slots >= 0]
    assert len(set(slots.tolist())) == len(slots) <= tokens.tiles * P
    assert slots.max() < tokens.tiles * P
    is_image = tokens.ids == model.config.image_token_id
    np.testing.assert_array_equal(is_image, tokens.slots != -1)


CHAT = (
  "{%- for message in messages -%}[{{ message['role'] }}]"
  "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
  "{%- for part in message['content'] -%}"
  "{{ PICTURE + '\n' if part['type'] == 'image' else part['text'] }}"
  "{%- endfor -%}{%- endif -%}[end]{%- endfor -%}"
  "{%- if add_generation_prompt -%}[assistant]{%- endif -%}"
)


def test_the_chat_template_of_smolvlm(tmp_path):
  """Its users' messages are lists of parts, and its answers end with a token of their own."""
  model = tiled_models.make("smolvlm", tmp_path / "model")
  tokenizer = model.source.tokenizer
  tokenizer.chat_template = processing_smolvlm.DEFAULT_CHAT_TEMPLATE
  record = model.record("What is it?", "A cat.", "tall.png")
  example = encode.encode(record, "auto", tokenizer, model.source.layout, 1000).example
  assert example is not None
  said = example.tokens[np.append(False, example.loss_mask[:-1] > 0)]
  assert tokenizer.decode(said) == " A cat.<end_of_utterance>"
  parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
  messages = [{"role": "user", "content": parts}]
  answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
  text = tokenizer.apply_chat_template([*messages, answer], tokenize=False).removesuffix("\n")
  processed = model.processor(images=[model.picture("tall.png")], text=text)
  assert processed["input_ids"][0] == example.tokens.tolist()


@pytest.mark.parametrize("template", ["auto", "vicuna"])
def test_chat_templates_make_the_tokens_of_training(model, template):
  """As servers use them: `auto` is the model's own, and others are exported as one."""
  tokenizer = copy.deepcopy(model.source.tokenizer)
  picture = tiled_models.as_typed(model, "<image>")
  tokenizer.chat_template = CHAT.replace("PICTURE", f"'{picture}'")
  record = model.record("What is <image> and <image>?", None, "wide.png", "tall.png")
  options = template, tokenizer, model.source.layout, 1000
  example = prompts.encode_prompt(record, *options).example
  assert example is not None
  tokenizer.chat_template = jinja_template.chat_template(template, tokenizer)
  parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is  and ?"}]
  messages = [{"role": "user", "content": parts}]
  text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
  pictures = [model.picture(path) for path in record.images]
  processed = model.processor(images=pictures, text=text, add_special_tokens=False)
  assert processed["input_ids"][0] == example.tokens.tolist()
