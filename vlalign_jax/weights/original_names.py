"""Maps the names of Vision-LLM-Alignment's tensors to canonical names."""

from vlalign_jax.errors import InputError
from vlalign_jax.weights import names

_PARTS = (
  ("vis_encoder.", "vision_tower."),
  ("lang_embed.", "language_model.model.embed_tokens."),
  ("lang_decoder.", "language_model."),
  ("v_head.", "score."),
)
# The embedding inside the decoder does not embed tokens; in tied models it is the output head.
UNUSED_EMBEDDING = "lang_decoder.model.embed_tokens.weight"
_UNUSED = (UNUSED_EMBEDDING, "projection.pos_embed")  # the second: fixed positions
# Projector -> (a tensor that only it has, its modules and their canonical names).
_PROJECTIONS = {
  "linear": (
    "projection.0.weight",
    (("projection.0.", "projector.linear."), ("projection.1.", "projector.norm.")),
  ),
  "vit": (
    "projection.vis_layer.layer_norm1.weight",
    (
      ("projection.vis_layer.", "projector.block."),
      ("projection.projection.0.", "projector.linear."),
      ("projection.projection.1.", "projector.norm."),
    ),
  ),
  "perceiver": (
    "projection.query",
    (
      ("projection.query", "projector.queries"),
      ("projection.ln_q.", "projector.query_norm."),
      ("projection.kv_proj.", "projector.input."),
      ("projection.ln_kv.", "projector.input_norm."),
      ("projection.attn.", "projector.attention."),
      ("projection.projection.0.", "projector.norm."),
      ("projection.projection.1.", "projector.linear."),
    ),
  ),
}
# torch.nn.MultiheadAttention joins the maps of query, key and value in one tensor.
_IN_PROJ = "projection.attn.in_proj_"


def canonical(name: str, kind: str) -> str | None:
  """Returns a tensor's canonical name, see `names.canonical`; None if the model does not need it.

  Args:
    name: in pytorch_model.bin.
    kind: of the projector.
  """
  name = name.removeprefix("rwtranrsformer.")
  if name in _UNUSED:
    return None
  renamed = names.replace_prefix(name, *_PROJECTIONS[kind][1], *_PARTS)
  return name if renamed == name else names.canonical(renamed)


def projector_of(path: str, stored: dict) -> str:
  """Returns the kind of the projector whose tensors are stored.

  Args:
    path: of the file, for errors.
    stored: tensors by name.

  Raises:
    InputError: there is no projector's tensor.
  """
  known = {name.removeprefix("rwtranrsformer.") for name in stored}
  for kind, (mark, _) in _PROJECTIONS.items():
    if mark in known:
      return kind
  listed = ", ".join(sorted(known)[:5])
  raise InputError(
    f"{path}: no tensors of a `projection` of Vision-LLM-Alignment ({listed}, ...); name the "
    "directory that it saved, such as OUTPUT/epoch-2"
  )


def split(stored: dict) -> dict:
  """Splits joined tensors of query, key and value; both dicts are name -> torch tensor."""
  result = {}
  for name, tensor in stored.items():
    prefix, joined, kind = name.partition(_IN_PROJ)
    if joined:
      parts = [f"{prefix}projection.attn.{part}_proj.{kind}" for part in "qkv"]
      result |= dict(zip(parts, tensor.chunk(3), strict=True))
    else:
      result[name] = tensor
  return result
