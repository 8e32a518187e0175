"""What the tensors of Vision-LLM-Alignment are called here."""

from vlalign_jax.errors import InputError
from vlalign_jax.weights import names

_PARTS = (
  ("vis_encoder.", "vision_tower."),
  ("lang_embed.", "language_model.model.embed_tokens."),
  ("lang_decoder.", "language_model."),
  ("v_head.", "score."),
)
# The decoder's own embedding, which reads no token; of some decoders it is the output head.
OWN_EMBEDDING = "lang_decoder.model.embed_tokens.weight"
_UNUSED = (OWN_EMBEDDING, "projection.pos_embed")  # the second: fixed positions
# A tensor that only this projector has, and its modules here.
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
# torch.nn.MultiheadAttention has three maps in one tensor.
_IN_PROJ = "projection.attn.in_proj_"


def canonical(name: str, kind: str) -> str | None:
  """A tensor's name as `names.canonical` gives it; None: the model does without it.

  Args:
    name: in pytorch_model.bin.
    kind: of the projector.
  """
  name = name.removeprefix("rwtranrsformer.")
  if name in _UNUSED:
    return None
  for theirs, ours in (*_PROJECTIONS[kind][1], *_PARTS):
    if name.startswith(theirs):
      return names.canonical(ours + name.removeprefix(theirs))
  return name


def projector_of(path: str, stored: dict) -> str:
  """The kind of the projector whose tensors are stored.

  Args:
    path: of the file, for errors.
    stored: by name.

  Raises:
    InputError: they are of none.
  """
  known = {name.removeprefix("rwtranrsformer.") for name in stored}
  for kind, (own, _) in _PROJECTIONS.items():
    if own in known:
      return kind
  listed = ", ".join(sorted(known)[:5])
  raise InputError(
    f"{path}: no tensors of a `projection` of Vision-LLM-Alignment ({listed}, ...); name the "
    "directory that it saved, such as OUTPUT/epoch-2"
  )


def split(stored: dict) -> dict:
  """Gives joined tensors a name each; `stored` and the result are torch tensors by name."""
  found = {}
  for name, tensor in stored.items():
    front, joined, kind = name.partition(_IN_PROJ)
    if joined:
      parts = [f"{front}projection.attn.{part}_proj.{kind}" for part in "qkv"]
      found |= dict(zip(parts, tensor.chunk(3), strict=True))
    else:
      found[name] = tensor
  return found
