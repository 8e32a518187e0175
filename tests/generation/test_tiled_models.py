"""Greedy answers of models whose pictures are several tiles equal those of transformers."""

from typing import Any

import numpy as np
import pytest

from tests import tiled_models
from vlalign_jax.generation.generate import make_generate
from vlalign_jax.generation.sampling import Sampling

NEW_TOKENS = 16


@pytest.mark.parametrize("name", tiled_models.MODELS)
def test_greedy_answers(name, tmp_path):
  model = tiled_models.make(name, tmp_path / "model")
  torch_model: Any = model.torch_model
  torch_model.generation_config.eos_token_id = None
  shown = [("wide.png",), (), ("tall.png", "line.png", "tall.png")]
  prompts = [
    model.encoded(model.record(tiled_models.words(seed, 3 + seed), None, *pictures))
    for seed, pictures in enumerate(shown)
  ]
  sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0)
  program = make_generate(model.config, sampling, pad_id=3)
  batch = model.rows([*([prompt] for prompt in prompts), []])
  generated = program(model.params, batch, np.arange(4), 0)
  for row, prompt in enumerate(prompts):
    inputs = model.torch_inputs(prompt)
    expected = torch_model.generate(
      **inputs, do_sample=False, pad_token_id=0, max_new_tokens=NEW_TOKENS
    )
    found = np.asarray(generated.tokens)[row, 0]
    assert found.tolist() == expected[0, len(prompt.tokens) :].tolist()
  assert np.asarray(generated.lengths)[3, 0] == 0
