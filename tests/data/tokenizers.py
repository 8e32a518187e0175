"""Small tokenizers of the kinds that real models have, trained on the spot."""

import json

from tokenizers import (
  AddedToken,
  Regex,
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)
from transformers import PreTrainedTokenizerFast

_CORPUS = [
  "A chat between a curious user and an artificial intelligence assistant. The assistant gives",
  "helpful, detailed, and polite answers to the user's questions.",
  "USER: What is in the image? ASSISTANT: A cat.",
  "You are a helpful language and vision assistant. You are able to understand the visual content",
  "### Image:\n\n### Question:\nHow many dogs are there?\n\n### Answer:\nThere are two dogs.",
  "[INST] <<SYS>>\n\n<</SYS>>\n\n [/INST] system user assistant: yes, no; (a) 'quoted' -- 12 + 30.",
  "def main():\n    return  1\n\n\nThe   spaces  and\ttabs. Café, naïve, 猫 が いる。 It's a dog!",
] * 4

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

_LLAMA_3_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
  """Trains a byte-level BPE tokenizer like Llama 3's: word pattern, special tokens, bos added."""
  backend = Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_LLAMA_3_WORDS), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=500,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator(_CORPUS, trainer)
  special = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|pad|>",
    "<image>",
  ]
  backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
  backend.post_processor = processors.TemplateProcessing(
    single="<|begin_of_text|> $A",
    special_tokens=[("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))],
  )
  return PreTrainedTokenizerFast(
    tokenizer_object=backend,
    bos_token="<|begin_of_text|>",
    eos_token="<|end_of_text|>",
    pad_token="<|pad|>",
    clean_up_tokenization_spaces=False,
  )


def sentencepiece_style_tokenizer(legacy: bool) -> PreTrainedTokenizerFast:
  """Trains a tokenizer like Llama 2's: BPE over "▁" for spaces, bytes for unknown characters.

  Args:
    legacy: every text between special tokens gets a leading "▁" (the normalizer in Llama 2's
      tokenizer.json); otherwise only the very beginning gets one.
  """
  start = Tokenizer(models.BPE())
  start.pre_tokenizer = pre_tokenizers.Metaspace()
  lines = [line.replace("\n", " ") for line in _CORPUS]
  start.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=300, show_progress=False))
  learned = sorted(start.get_vocab(), key=start.token_to_id)
  merges = [tuple(pair) for pair in json.loads(start.to_str())["model"]["merges"]]
  merges += [("▁", "▁"), ("▁▁", "▁▁")]  # Llama 2 has tokens for runs of spaces
  texts = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *learned,
    "▁▁",
    "▁▁▁▁",
  ]
  vocabulary = {text: index for index, text in enumerate(texts)}
  backend = Tokenizer(
    models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
  )
  if legacy:
    backend.normalizer = normalizers.Sequence(
      [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
  else:
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", left=1),
    ]
  )
  special = ["<unk>", "<s>", "</s>", "<image>"]
  backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
  backend.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
  )
  return PreTrainedTokenizerFast(
    tokenizer_object=backend,
    bos_token="<s>",
    eos_token="</s>",
    unk_token="<unk>",
    clean_up_tokenization_spaces=False,
  )
