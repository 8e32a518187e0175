"""Tests LLaMA directories with a SentencePiece tokenizer.model, like Vicuna's and Llama 2's."""

import io
import json
import shutil

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer

from tests import parity, tiny_models
from vlalign_jax.data.tokens import tokenize_pieces
from vlalign_jax.errors import InputError
from vlalign_jax.weights import export, source

LINES = [
  "A chat between a curious user and an artificial intelligence assistant. The assistant gives",
  "helpful, detailed, and polite answers to the user's questions.",
  "USER: What is in the image? ASSISTANT: A cat and two dogs.",
]
# tokenizer_config.json of Vicuna.
CONFIG = {
  "tokenizer_class": "LlamaTokenizer",
  "legacy": False,
  "add_bos_token": True,
  "add_eos_token": False,
  "bos_token": "<s>",
  "eos_token": "</s>",
  "unk_token": "<unk>",
  "pad_token": None,
}


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
  """(a `model` group with a CLIP and a LLaMA directory, the SentencePiece model as bytes)."""
  clip, llama = (tmp_path_factory.mktemp(name) for name in ("clip", "llama"))
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(LINES * 5),
    model_writer=model,
    model_type="bpe",
    byte_fallback=True,
    vocab_size=350,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    minloglevel=2,
  )
  tiny_models.make_clip(clip, whole=False)
  tiny_models.make_llama(llama, vocab_size=350, bos_token_id=1, eos_token_id=2, pad_token_id=None)
  for file in llama.glob("*token*"):
    file.unlink()
  (llama / "tokenizer.model").write_bytes(model.getvalue())
  (llama / "tokenizer_config.json").write_text(json.dumps(CONFIG))
  return parity.model_group(vision=str(clip), language=str(llama)), model.getvalue()


def test_a_tokenizer_model_and_its_config_are_read(towers, tmp_path):
  group, model = towers
  opened = source.open_source(group)
  tokenizer, expected = opened.tokenizer, sentencepiece.SentencePieceProcessor(model_proto=model)
  assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
  assert tokenizer.convert_tokens_to_ids("<image>") == opened.config.image_token_id == 350
  for text in (*LINES, "two  spaces, é and 猫\nand a line"):
    assert tokenizer(text)["input_ids"] == [1, *expected.encode(text)]
  question, answer = tokenize_pieces(["USER: <image>\nA cat? ASSISTANT:", " two</s>"], tokenizer)
  before, after = expected.encode("USER: "), expected.encode("x\nA cat? ASSISTANT:")
  assert question.tolist() == [1, *before, 350, *after[len(expected.encode("x")) :]]
  assert answer.tolist() == [*expected.encode("two"), 2]
  # Runs and exports have a tokenizer.json.
  export.save_model_files(opened, str(tmp_path), "float32", "vicuna")
  exported = AutoTokenizer.from_pretrained(tmp_path)
  text = f"{LINES[2]} <image>\nyes</s>"
  np.testing.assert_array_equal(exported(text)["input_ids"], tokenizer(text)["input_ids"])


def test_without_a_config_its_ids_are_those_of_sentencepiece(towers, tmp_path):
  model = towers[1]
  expected = sentencepiece.SentencePieceProcessor(model_proto=model)
  llama = tmp_path / "llama"
  shutil.copytree(towers[0].language, llama)
  (llama / "tokenizer_config.json").unlink()
  opened = source.open_source(parity.model_group(vision=towers[0].vision, language=str(llama)))
  export.save_model_files(opened, str(tmp_path / "out"), "float32", "vicuna")
  exported = AutoTokenizer.from_pretrained(tmp_path / "out")
  assert opened.tokenizer.eos_token_id == exported.eos_token_id == 2
  for tokenizer in (opened.tokenizer, exported):
    for text in (*LINES, " a space", "", "two  spaces, é and 猫\nand a line "):
      assert tokenizer(text)["input_ids"] == [1, *expected.encode(text)]
    # Text between special tokens is encoded separately, as by Llama 2's tokenizer.json.
    ids = tokenizer("A cat</s>two dogs")["input_ids"]
    assert ids == [1, *expected.encode("A cat"), 2, *expected.encode("two dogs")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "A cat two dogs"


@pytest.mark.parametrize(
  ("options", "reason"),
  [({"bos_id": -1}, "no bos_token"), ({"add_dummy_prefix": False}, "LLaMA's tokenizer lacks")],
)
def test_a_tokenizer_model_unlike_that_of_llama(towers, tmp_path, options, reason):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(LINES * 5),
    model_writer=model,
    model_type="bpe",
    byte_fallback=True,
    vocab_size=350,
    minloglevel=2,
    **options,
  )
  shutil.copy(f"{towers[0].language}/config.json", tmp_path)
  (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
  with pytest.raises(InputError, match=reason):
    source.open_source(parity.model_group(vision=towers[0].vision, language=str(tmp_path)))


@pytest.mark.parametrize("config", [True, False])
def test_a_damaged_tokenizer_model(towers, tmp_path, config):
  for name in ("config.json", *["tokenizer_config.json"] * config):
    shutil.copy(f"{towers[0].language}/{name}", tmp_path)
  (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
  group = parity.model_group(vision=towers[0].vision, language=str(tmp_path))
  with pytest.raises(InputError) as caught:
    source.open_source(group)
  assert "tokenizer.model is not a SentencePiece model" in str(caught.value)
  assert "tiktoken" not in str(caught.value)
  assert "\n" not in str(caught.value)
