"""Language models by the `model_type` of their Hugging Face configs: what each adds to LLaMA."""

from vlalign_jax.errors import InputError


def _llama(hf, where: str) -> dict:
  return {"attention_bias": hf.attention_bias, "mlp_bias": hf.mlp_bias}


def _qwen2(hf, where: str) -> dict:
  return {"qkv_bias": True, "sliding_window": _window(hf, where)}


def _mistral(hf, where: str) -> dict:
  return {"sliding_window": _window(hf, where)}


# Type -> (its config, what to call it in errors) -> what models.llama.LanguageConfig is beside the
# sizes that all have. Tensors are named by these fields, see `names`.
DECODERS = {"llama": _llama, "mistral": _mistral, "qwen2": _qwen2}


def _window(hf, where: str) -> int | None:
  """Positions that every layer's queries see; None: all."""
  kinds = set(getattr(hf, "layer_types", None) or ())
  if len(kinds) > 1 or not kinds <= {"full_attention", "sliding_attention"}:
    raise InputError(
      f"{where}: its layers have attention of several kinds ({', '.join(sorted(kinds))}); only the "
      "same in all layers, full or with a sliding window, is supported"
    )
  return None if kinds == {"full_attention"} else hf.sliding_window
