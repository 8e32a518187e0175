"""Greedy answers of other towers equal transformers': with SigLIP, and past sliding windows."""

import pytest

from tests import tiny_models
from tests.generation import tiny_llava
from tests.generation.test_greedy import NEW_TOKENS, answers

WINDOWS = {
  "qwen2": tiny_models.QWEN2_WINDOW,
  "mistral": tiny_models.MISTRAL_WINDOW,
  "qwen3": tiny_models.QWEN3_WINDOW,
}


def test_greedy_answers_about_pictures_that_siglip_sees(tmp_path):
  model = tiny_llava.make(str(tmp_path), **tiny_models.SIGLIP)
  assert model.config.tokens_per_image == model.config.vision.patches
  expected = [model.torch_answer(prompt, max_new_tokens=NEW_TOKENS) for prompt in model.prompts]
  assert answers(model, model.batch())[0] == expected


@pytest.mark.parametrize("name", WINDOWS)
def test_greedy_answers_past_the_window(name, tmp_path):
  model = tiny_llava.make(str(tmp_path), text=WINDOWS[name])
  window = model.config.language.sliding_window
  assert window < NEW_TOKENS
  lengths = [len(prompt.tokens) for prompt in model.prompts]
  assert min(lengths) < window < max(lengths)  # some prompts are longer than it, others shorter
  expected = [model.torch_answer(prompt, max_new_tokens=NEW_TOKENS) for prompt in model.prompts]
  assert answers(model, model.batch())[0] == expected
