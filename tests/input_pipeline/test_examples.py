"""The page of a run's first examples: what it says is learned, is."""

import pytest

from tests import sft_run, tiny_models
from vlalign_jax.input_pipeline import examples, preferences, sft
from vlalign_jax.weights import source


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  directory = tmp_path_factory.mktemp("examples")
  tiny_models.make_llava(str(directory / "model"))
  records = sft_run.make_records(str(directory / "data"), 14)
  sft_run.write_json(directory / "data" / "sft.json", records)
  sft_run.write_json(directory / "data" / "ten.json", records[:10])
  sft_run.write_json(directory / "data" / "ranked.json", sft_run.ranked(records))
  return directory


def prepared_of(directory, name, kind, **overrides):
  config = sft_run.make_config(directory / "model", directory / "data" / name, **overrides)
  return kind.prepare_train(config, source.open_for(config), kind.load_records(config)[0], 1)


def parts_of(prepared, number):
  load = prepared.load_example
  return [
    "".join(f"[{text}]" if learned else text for text, learned in parts)
    for parts in examples.parts_of(load(number), load.tokenizer, load.layout.image_token_id)
  ]


def test_a_conversation(directory):
  (text,) = parts_of(prepared_of(directory, "sft.json", sft), 3)
  assert text.startswith("<|begin_of_text|>A chat between a curious user and an artificial")
  assert text.endswith(
    "USER: <image>\nWhat color is it? ASSISTANT:[ red<|end_of_text|>]USER: Is it a cat?"
    " ASSISTANT:[ no, it is a picture<|end_of_text|>]"
  )


def test_ranked_answers(directory):
  prompt, *answers = parts_of(prepared_of(directory, "ranked.json", preferences), 6)
  assert prompt.endswith("USER: <image>\n<image>\nWhat color is the first? ASSISTANT:")
  assert answers == ["[ red<|end_of_text|>]", "[ a cat<|end_of_text|>]"]


def test_the_page(directory):
  prepared = prepared_of(directory, "ten.json", sft)
  page = examples.page(prepared)
  assert page.count("<section>") == prepared.records == 10
  # One picture each; none of every fifth record, two of every seventh.
  assert page.count("<img ") == 10 - 2 + 1
  assert page.count("<mark>") == 1 + 10 + 2
  assert "data/ten.json, record 0" in page
  assert "gray" not in page


def test_the_page_of_a_blind_run(directory):
  page = examples.page(prepared_of(directory, "sft.json", sft, **{"data.blank_images": True}))
  assert page.count("<section>") == examples.SHOWN
  assert "gray" in page
