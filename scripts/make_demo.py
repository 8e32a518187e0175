"""Draws a small visual question-answering set and makes a tiny LLaVA model with random weights.

  python scripts/make_demo.py --output=DIR

writes DIR/train.json, DIR/eval.json (other pictures), DIR/images/*.png and DIR/model, a directory
in the layout of LlavaForConditionalGeneration with a tokenizer trained on the set's own words.
DIR/preferences_train.json and DIR/preferences_eval.json ask everything about the same pictures: a
question with its right answer, one or two wrong ones, and one that misses the point or does not
stop, ranked in this order.
"""

import json
import os
import random

import vlalign_jax  # noqa: F401 isort: skip (before transformers: it drops a line of that)

import jax
import jax.numpy as jnp
from absl import flags
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
  CLIPVisionConfig,
  GenerationConfig,
  LlamaConfig,
  LlavaConfig,
  PreTrainedTokenizerFast,
)

from vlalign_jax import cli
from vlalign_jax.data import templates
from vlalign_jax.data.conversations import Turn
from vlalign_jax.data.image_processor import ImagePreprocessor
from vlalign_jax.models import vlm
from vlalign_jax.weights import assemble, export, parts

_OUTPUT = flags.DEFINE_string("output", "runs/demo/data", "Where to write.")
_TRAIN = flags.DEFINE_integer("train", 4000, "Pictures to learn from.")
_EVAL = flags.DEFINE_integer("eval", 300, "Pictures held out.")
_SEED = flags.DEFINE_integer("seed", 0, "Of pictures, questions and weights.")

TEMPLATE = "vicuna"
SIDE = 48  # pixels
COLORS = {
  "red": (214, 39, 40),
  "green": (44, 160, 44),
  "blue": (31, 80, 220),
  "yellow": (240, 220, 30),
  "purple": (148, 60, 189),
  "white": (245, 245, 245),
}
NUMBERS = ("one", "two", "three", "four")
CORNERS = {
  "top left": (0, 0),
  "top right": (1, 0),
  "bottom left": (0, 1),
  "bottom right": (1, 1),
}

VALUES = {"color": tuple(COLORS), "count": NUMBERS, "corner": tuple(CORNERS)}
QUESTIONS = {
  "color": ("What color are the discs?", "Which color do you see?"),
  "count": ("How many discs are there?", "Count the discs."),
  "corner": ("Where are the discs?", "Which corner are the discs in?"),
}
ANSWERS = {"color": "They are {}.", "count": "There are {}.", "corner": "In the {} corner."}


def draw_scene(rng: random.Random) -> tuple[Image.Image, dict[str, str]]:
  """A picture of some discs in one corner, and what there is to say about it."""
  color, count, corner = rng.choice(list(COLORS)), rng.randint(1, 4), rng.choice(list(CORNERS))
  shade = rng.randint(20, 70)
  image = Image.new("RGB", (SIDE, SIDE), (shade, shade, shade))
  pen = ImageDraw.Draw(image)
  half = SIDE // 2
  cells = rng.sample([(0, 0), (1, 0), (0, 1), (1, 1)], count)
  for x, y in cells:
    left = CORNERS[corner][0] * half + x * half // 2 + rng.randint(1, 3)
    top = CORNERS[corner][1] * half + y * half // 2 + rng.randint(1, 3)
    size = rng.randint(6, 8)
    pen.ellipse((left, top, left + size, top + size), fill=COLORS[color])
  return image, {"color": color, "count": NUMBERS[count - 1], "corner": corner}


def question_about(kind: str, scene: dict[str, str], rng: random.Random) -> tuple[str, str]:
  """A question of a kind, in one of two wordings, with its answer."""
  return rng.choice(QUESTIONS[kind]), ANSWERS[kind].format(scene[kind])


def ranked_answers(kind: str, scene: dict[str, str], rng: random.Random) -> list[str]:
  """The right answer, one or two wrong ones, and one that is none, best first.

  Of two wrong counts the one that is further off is worse, and so is the corner opposite to the
  right one. The last answer misses the point (it is about something else, or its value is) or does
  not stop: it has two or three sentences, and may begin with the right one. A reward model may like
  whatever it has never seen to be wrong, and a policy finds that out.
  """
  values = [value for value in VALUES[kind] if value != scene[kind]]
  wrong = rng.sample(values, 2)
  distances = [distance(kind, value, scene[kind]) for value in wrong]
  if distances[0] > distances[1]:
    wrong.reverse()
  elif distances[0] == distances[1]:
    del wrong[1]
  answers = [ANSWERS[kind].format(value) for value in (scene[kind], *wrong)]
  if rng.random() < 0.5:
    other = rng.choice([other for other in ANSWERS if other != kind])
    answers.append(ANSWERS[rng.choice((kind, other))].format(rng.choice(VALUES[other])))
  else:
    sentences = [rng.choice(answers)]
    for _ in range(rng.randint(1, 2)):
      of = rng.choice((kind, *ANSWERS))
      sentences.append(ANSWERS[of].format(rng.choice(VALUES[of])))
    answers.append(" ".join(sentences))
  return answers


def distance(kind: str, value: str, right: str) -> int:
  """How wrong a value is."""
  if kind == "count":
    return abs(NUMBERS.index(value) - NUMBERS.index(right))
  if kind == "corner":
    return sum(a != b for a, b in zip(CORNERS[value], CORNERS[right], strict=True))
  return int(value != right)


def make_split(
  name: str, size: int, output: str, rng: random.Random, ranks: random.Random
) -> list[dict]:
  """Draws pictures and writes them with one record each, of one to three turns.

  Each also has a record with ranked answers for each kind of question.
  """
  records, preferences = [], []
  for number in range(size):
    image, scene = draw_scene(rng)
    path = f"{name}_{number:05d}.png"
    image.save(os.path.join(output, "images", path))
    kinds = rng.sample(["color", "count", "corner"], rng.randint(1, 3))
    turns = []
    for kind in kinds:
      question, answer = question_about(kind, scene, rng)
      placeholder = "" if turns else "<image>\n"
      turns += [
        {"from": "human", "value": placeholder + question},
        {"from": "gpt", "value": answer},
      ]
    records.append({"id": f"{name}-{number}", "image": path, "conversations": turns})
    for kind in QUESTIONS:
      question, _ = question_about(kind, scene, ranks)
      turns = [
        {"from": "human", "value": f"<image>\n{question}"},
        {"from": "gpt", "value": ranked_answers(kind, scene, ranks)},
      ]
      preferences.append({"id": f"{name}-{number}-{kind}", "image": path, "conversations": turns})
  for file_name, content in ((name, records), (f"preferences_{name}", preferences)):
    with open(os.path.join(output, f"{file_name}.json"), "w", encoding="utf-8") as file:
      json.dump(content, file, indent=1)
  return records


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
  """A byte-level BPE tokenizer with LLaVA's special tokens."""
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  special = ["<unk>", "<s>", "</s>", assemble.PAD_TOKEN, parts.IMAGE_TOKEN]
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  tokenizer.train_from_iterator(
    texts,
    trainers.BpeTrainer(
      vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    ),
  )
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    unk_token="<unk>",
    bos_token="<s>",
    eos_token="</s>",
    pad_token=assemble.PAD_TOKEN,
    extra_special_tokens={"image_token": parts.IMAGE_TOKEN},
  )


def make_model(tokenizer: PreTrainedTokenizerFast, output: str, seed: int) -> None:
  """Writes a LLaVA directory with random weights."""
  hf = LlavaConfig(
    vision_config=CLIPVisionConfig(
      hidden_size=96,
      intermediate_size=192,
      num_hidden_layers=2,
      num_attention_heads=4,
      image_size=SIDE,
      patch_size=12,
    ),
    text_config=LlamaConfig(
      vocab_size=-(-len(tokenizer) // 64) * 64,
      hidden_size=96,
      intermediate_size=256,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      max_position_embeddings=512,
      bos_token_id=tokenizer.bos_token_id,
      eos_token_id=tokenizer.eos_token_id,
      pad_token_id=tokenizer.pad_token_id,
    ),
    image_token_index=tokenizer.convert_tokens_to_ids(parts.IMAGE_TOKEN),
    vision_feature_layer=-1,
  )
  images = ImagePreprocessor.from_config(
    {
      "image_processor_type": "CLIPImageProcessor",
      "size": {"shortest_edge": SIDE},
      "crop_size": {"height": SIDE, "width": SIDE},
    }
  )
  generation = GenerationConfig(
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
  )
  model = parts.from_parts(hf, generation, tokenizer, images, "the demo model")
  _, params = vlm.init_params(model.config, jax.random.key(seed), param_dtype=jnp.float32)
  export.export_model(model, params, output)


def main(_):
  output, rng = _OUTPUT.value, random.Random(_SEED.value)
  os.makedirs(os.path.join(output, "images"), exist_ok=True)
  ranks = random.Random(_SEED.value + 1)
  records = make_split("train", _TRAIN.value, output, rng, ranks)
  make_split("eval", _EVAL.value, output, rng, ranks)
  # Trained on the texts as the model will see them: the template's own words become few tokens.
  plain, texts = train_tokenizer([]), []
  for record in records:
    words = [turn["value"] for turn in record["conversations"]]
    turns = [Turn(*pair) for pair in zip(words[::2], words[1::2], strict=True)]
    texts += [piece.text for piece in templates.render(turns, TEMPLATE, plain, record["id"])]
  make_model(train_tokenizer(texts), os.path.join(output, "model"), _SEED.value)
  print(f"{len(records)} training and {_EVAL.value} held-out pictures, and a model, in {output}")


if __name__ == "__main__":
  cli.run(main)
