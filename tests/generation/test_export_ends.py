"""transformers' generate, on an export, gets our prompt and ends where our prediction ends."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests import parity
from tests.data.test_jinja_template import LLAMA_3
from tests.generation.test_greedy import answers
from vlalign_jax.data import encode, templates
from vlalign_jax.data.conversations import Turn
from vlalign_jax.data.picture_tokens import OneTile
from vlalign_jax.data.records import Record
from vlalign_jax.input_pipeline import prompts
from vlalign_jax.weights import export, parts

TURNS = (Turn("<image>\nWhat is it?", "A cat."), Turn("How many dogs?", None))
LIMIT = 24


def export_model(model, template: str, directory):
  """Returns (source of a run with the template, params, its export's model, its processor)."""
  opened, _, params = parity.open_model(model.directory)
  if template == "auto":
    opened.tokenizer.chat_template = LLAMA_3
  files = str(directory / "model")  # as in a run directory
  export.save_model_files(opened, files, "float32", template)
  tokenizer = parts.load_tokenizer(files)
  generation = parts.load_generation(files, tokenizer)
  source = dataclasses.replace(opened, tokenizer=tokenizer, generation=generation)
  output = str(directory / "out")
  export.export_model(source, params, output)
  loaded = transformers.LlavaForConditionalGeneration.from_pretrained(output).eval()
  return source, params, loaded, transformers.AutoProcessor.from_pretrained(output)


def make_inputs(processor, turns, system: str | None, typed: bool, picture):
  """Returns a conversation's inputs as servers prepare them."""
  messages = [{"role": "system", "content": system}] if system else []
  for turn in turns:
    content = turn.human
    if typed:
      content = [{"type": "image", "image": picture}] * turn.human.count("<image>")
      content.append({"type": "text", "text": turn.human.replace("<image>", "").strip()})
    messages.append({"role": "user", "content": content})
    if turn.gpt:
      text = turn.gpt
      messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
      if not typed:
        messages[-1]["content"] = text
  if typed:
    if system:
      messages[0]["content"] = [{"type": "text", "text": system}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(messages, add_generation_prompt=True, **options)
  text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
  return processor(
    text=text, images=[picture], return_tensors="pt", text_kwargs={"add_special_tokens": False}
  )


def swap(array, one: int, other: int):
  """Exchanges two rows in place, so that one token is generated in place of the other."""
  array[[one, other]] = array[[other, one]]


@pytest.mark.parametrize("template", templates.TEMPLATES)
def test_generate_ends_where_prediction_ends(model, template, tmp_path):
  opened, params, loaded, processor = export_model(model, template, tmp_path)
  tokenizer, config = opened.tokenizer, opened.config
  stops = prompts.stop_tokens(opened, template)
  assert loaded.generation_config.eos_token_id == list(stops)
  ends = {"llama_3": "<|eot_id|>", "auto": "<|eot_id|>"}
  end = tokenizer.convert_tokens_to_ids(ends.get(template, tokenizer.eos_token))
  typed = template != "auto"  # this template takes text
  picture = Image.fromarray(model.pictures["0.png"])
  turns = TURNS[:1] if template == "plain" else TURNS
  turns = (*turns[:-1], dataclasses.replace(turns[-1], gpt=None))
  record = Record("t.json", 0, "x", ("0.png",), turns, ())
  layout = OneTile(config.image_token_id, config.tokens_per_image)
  options = (template, tokenizer, layout, 1000)
  ours = prompts.encode_prompt(record, *options).example
  cases = [(ours, make_inputs(processor, turns, None, typed, picture))]
  if template != "plain":
    inputs = make_inputs(processor, turns, "Be brief.", typed, picture)
    tokens = inputs["input_ids"][0].numpy().astype(np.int32)
    assert len(tokens) != len(ours.tokens)
    cases.append((_with_tokens(ours, tokens), inputs))
  for prompt, inputs in cases:
    assert inputs["input_ids"][0].tolist() == prompt.tokens.tolist()
    batch = model.batch([prompt], length=-(-len(prompt.tokens) // 64) * 64)
    (endless,), ended = answers(model, batch, max_new_tokens=LIMIT)
    assert not any(ended)
    assert not set(endless) & set(stops)
    weights = copy.deepcopy(loaded.state_dict())
    kernel = np.array(params["language"]["head"]["kernel"])
    token = next(t for n, t in enumerate(endless) if n > 3 and t not in endless[:n])
    swap(kernel.T, token, end)
    swap(loaded.lm_head.weight.data, token, end)
    language = params["language"] | {"head": {"kernel": kernel}}
    swapped = dataclasses.replace(model, params=params | {"language": language})
    (answer,), ended = answers(swapped, batch, max_new_tokens=LIMIT, stop_tokens=stops)
    with torch.no_grad():
      theirs = loaded.generate(**inputs, do_sample=False, max_new_tokens=LIMIT)
    assert theirs[0, len(prompt.tokens) :].tolist() == answer
    assert answer == [*endless[: endless.index(token)], end]
    assert ended == [True]
    loaded.load_state_dict(weights)


def _with_tokens(example: encode.Example, tokens: np.ndarray) -> encode.Example:
  zeros = np.zeros(len(tokens), np.int32)
  return dataclasses.replace(
    example,
    tokens=tokens,
    positions=np.arange(len(tokens), dtype=np.int32),
    branches=zeros,
    targets=zeros,
    loss_mask=zeros.astype(np.float32),
  )
