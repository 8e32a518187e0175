"""Answers to a file of records as text, against transformers' tokens and answers."""

import json
import logging

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from tests import parity
from vlalign_jax.data.records import Options, load_records
from vlalign_jax.errors import InputError
from vlalign_jax.generation.answers import generate_answers
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.stages import defaults
from vlalign_jax.weights import source

SYSTEM = (
  "A chat between a curious user and an artificial intelligence assistant. The assistant gives"
  " helpful, detailed, and polite answers to the user's questions. "
)
QUESTIONS = (
  ("<image>\nWhat is in the image?", ["0.png"]),
  ("How many dogs are there?", []),
  ("<image><image>\nAre these alike, and if not, which has more dogs?", ["1.png", "2.png"]),
  ("Why? " * 60, []),
  ("<image>\nA cat?", ["2.png"]),
)
SAMPLING = Sampling(8, temperature=0)


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
  directory = tmp_path_factory.mktemp("records")
  for name, picture in model.pictures.items():
    Image.fromarray(picture).save(directory / name)
  records = []
  for number, (question, images) in enumerate(QUESTIONS):
    turns = [{"from": "human", "value": question}]
    if number % 2:
      turns.append({"from": "gpt", "value": "never read"})
    records.append({"id": f"q{number}", "image": images, "conversations": turns})
  (directory / "test.json").write_text(json.dumps(records))
  return directory


@pytest.fixture(scope="module")
def everything(model, files):
  """Returns (config, source, records, mesh)."""
  config = defaults("sft")
  config.batch_size = 2
  config.model.dtype = "float32"
  config.data.max_length = 192
  opened = source.open_source(parity.model_group(init_from=model.directory))
  records = load_records(str(files / "test.json"), Options(answers="optional"))
  mesh = meshes.make_mesh(config.mesh, jax.devices()[:1])
  return config, opened, records, mesh


def ask(model, everything, sampling=SAMPLING, **options):
  config, opened, records, mesh = everything
  return list(generate_answers(config, opened, model.params, records, sampling, mesh, **options))


def test_texts_are_those_of_transformers(model, everything, caplog):
  caplog.set_level(logging.INFO)
  tokenizer = everything[1].tokenizer
  answers = {answer.record: answer for answer in ask(model, everything)}
  assert sorted(answers) == [0, 1, 2, 4]  # the fourth question is too long
  assert "5 records; 1 skipped, their prompt does not fit data.max_length=192" in caplog.text
  assert "keys and values of 2 prompts of up to" in caplog.text
  for number, answer in answers.items():
    question, images = QUESTIONS[number]
    text = question.replace("<image>", "").strip()
    placeholders = ("<image>" * model.config.tokens_per_image + "\n") * len(images)
    tokens = tokenizer(
      f"{SYSTEM}USER: {placeholders}{text} ASSISTANT:", return_tensors="pt"
    ).input_ids
    pixels = {}
    if images:
      pictures = [model.pictures[name] for name in images]
      pixels = {"pixel_values": parity.pixel_values(model.config, pictures)}
    expected = model.torch_model.generate(
      input_ids=tokens,
      attention_mask=torch.ones_like(tokens),
      **pixels,
      max_new_tokens=8,
      do_sample=False,
      eos_token_id=tokenizer.eos_token_id,
      pad_token_id=0,
    )[0, tokens.shape[1] :]
    assert answer.tokens.tolist() == expected.tolist()
    assert answer.text == tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert answer.sample == 0
    assert answer.log_probability < 0


def test_samples_do_not_depend_on_the_other_records(model, everything):
  sampling = Sampling(8, num_return_sequences=3, temperature=1.2, stop_tokens=tuple(range(40)))
  together = ask(model, everything, sampling)
  assert [answer.sample for answer in together] == [0, 1, 2] * 4
  assert all(answer.ended == (answer.tokens[-1] < 40) for answer in together)
  assert {answer.ended for answer in together} == {True, False}
  config, opened, records, mesh = everything
  alone = ask(model, (config, opened, records[2:3], mesh), sampling)
  third = [answer for answer in together if answer.record == 2]
  for answer, expected in zip(alone, third, strict=True):
    assert answer.tokens.tolist() == expected.tokens.tolist()
    np.testing.assert_allclose(answer.log_probability, expected.log_probability, rtol=1e-5)
  rest = ask(model, everything, sampling, done=[2, 0])
  assert {answer.record for answer in rest} == {1, 4}


def test_an_image_that_cannot_be_decoded(model, everything, files):
  config, opened, records, mesh = everything
  broken = files / "0.png"
  content = broken.read_bytes()
  broken.write_bytes(content[: len(content) // 2])
  try:
    with pytest.raises(InputError, match='"q0".*cannot be decoded'):
      ask(model, everything)
    skipping = config.copy_and_resolve_references()
    skipping.data.on_bad_record = "skip"
    answers = ask(model, (skipping, opened, records, mesh))
    assert {answer.record for answer in answers} == {1, 2, 4}
  finally:
    broken.write_bytes(content)


def test_no_prompt_fits(model, everything):
  config, opened, records, mesh = everything
  short = config.copy_and_resolve_references()
  short.data.max_length = 8
  with pytest.raises(InputError, match="no prompt of 5 records fits data.max_length=8; raise it"):
    ask(model, (short, opened, records, mesh))
