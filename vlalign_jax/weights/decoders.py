"""Lists language models by the `model_type` of their configs, and what each adds to LLaMA."""

from vlalign_jax.errors import InputError


def _llama(hf, where: str) -> dict:
  return {"attention_bias": hf.attention_bias, "mlp_bias": hf.mlp_bias}


def _qwen2(hf, where: str) -> dict:
  return {"qkv_bias": True, "sliding_window": _window(hf, where)}


def _mistral(hf, where: str) -> dict:
  return {"sliding_window": _window(hf, where)}


def _qwen3(hf, where: str) -> dict:
  window = _window(hf, where)
  return {"attention_bias": hf.attention_bias, "query_key_norm": True, "sliding_window": window}


# Type -> function of (Hugging Face config, name for errors) that returns the fields of
# models.llama.LanguageConfig other than sizes. `names` has the tensors of these fields.
DECODERS = {"llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3}


def _window(hf, where: str) -> int | None:
  """Returns the length of the sliding window of all layers; None: no window."""
  kinds = set(getattr(hf, "layer_types", None) or ())
  if len(kinds) > 1 or not kinds <= {"full_attention", "sliding_attention"}:
    raise InputError(
      f"{where}: its layers have different kinds of attention ({', '.join(sorted(kinds))}); all "
      "layers must have the same: full attention or a sliding window"
    )
  return None if kinds == {"full_attention"} else hf.sliding_window
