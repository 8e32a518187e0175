"""The same attention and the same SFT step in torch and transformers, where these are installed."""

import importlib.util
import time


def missing() -> str | None:
  """Returns why torch cannot be measured, or None."""
  for name in ("torch", "transformers"):
    if importlib.util.find_spec(name) is None:
      return f"{name} is not installed"
  return None


def attention(settings):
  """Yields torch's scaled_dot_product_attention by kernel, for causal rows of one example."""
  if problem := missing():
    yield {"what": "skipped", "error": problem}
    return
  import torch
  from torch.nn.attention import SDPBackend, sdpa_kernel

  place = "cuda" if torch.cuda.is_available() else "cpu"
  rows, length, heads, width = (2, 64, 4, 16) if settings["tiny"] else (4, 2048, 32, 128)
  wait = torch.cuda.synchronize if place == "cuda" else lambda: None
  for kv_heads in (heads, heads // 4):
    shapes = [(rows, count, length, width) for count in (heads, kv_heads, kv_heads)]
    arrays = [
      torch.randn(s, device=place, dtype=torch.bfloat16, requires_grad=True) for s in shapes
    ]
    cotangent = torch.randn(shapes[0], device=place, dtype=torch.bfloat16)
    flops = 2 * rows * heads * length**2 * width
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
      what = f"{heads}/{kv_heads} single: {kernel.name.lower()}"

      def forward():
        return torch.nn.functional.scaled_dot_product_attention(
          *arrays,  # noqa: B023
          is_causal=True,
          enable_gqa=kv_heads != heads,  # noqa: B023
        )

      def both():
        torch.autograd.grad(forward(), arrays, cotangent)  # noqa: B023

      try:
        with sdpa_kernel(kernel):
          took = [_seconds(call, wait, 1 if settings["tiny"] else 10) for call in (forward, both)]
      except RuntimeError as error:
        yield {"what": what, "error": str(error).splitlines()[0][:300]}
        continue
      yield {
        "what": what,
        "forward_ms": took[0] * 1e3,
        "forward_tflops": flops / took[0] / 1e12,
        "both_ms": took[1] * 1e3,
        "tflops": 3.5 * flops / took[1] / 1e12,
      }


def _seconds(call, wait, inner: int) -> float:
  call()
  wait()
  took = []
  for _ in range(3):
    start = time.perf_counter()
    for _ in range(inner):
      call()
    wait()
    took.append((time.perf_counter() - start) / inner)
  return sorted(took)[1]


def steps(sizes: dict, implementation: str):
  """Yields the loss of step after step: LLaVA, tower frozen, autocast, AdamW, checkpointing.

  Args:
    sizes: of `versus.sizes`.
    implementation: transformers' attn_implementation.
  """
  import torch
  from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

  torch.manual_seed(0)
  place = "cuda" if torch.cuda.is_available() else "cpu"
  vision, text = sizes["vision"], sizes["text"]
  config = LlavaConfig(
    vision_config=CLIPVisionConfig(**vision),
    text_config=LlamaConfig(**text),
    image_token_index=text["vocab_size"] - 1,
    image_seq_length=sizes["image_tokens"],
  )
  config._attn_implementation = implementation
  with torch.device(place):
    model = LlavaForConditionalGeneration._from_config(
      config, dtype=torch.float32, attn_implementation=implementation
    )
  model.train()
  model.model.vision_tower.requires_grad_(False).to(torch.bfloat16)
  model.gradient_checkpointing_enable({"use_reentrant": False})
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(
    trained, 2e-5, (0.9, 0.999), weight_decay=0.0, fused=place == "cuda"
  )
  rows, length, image = sizes["rows"], sizes["length"], sizes["image_tokens"]
  tokens = torch.randint(5, text["vocab_size"] - 1, (rows, length), device=place)
  tokens[:, :image] = text["vocab_size"] - 1
  labels = tokens.clone()
  labels[:, :image] = -100
  side = vision["image_size"]
  pixels = torch.randn((rows, 3, side, side), device=place, dtype=torch.bfloat16)
  while True:
    with torch.autocast(place, torch.bfloat16):
      # Without padding no mask is needed: the fastest of torch's ways.
      out = model(input_ids=tokens, pixel_values=pixels, labels=labels, use_cache=False)
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    yield float(out.loss.detach())


def peak_memory() -> float | None:
  """Returns the most GiB that torch held on the card."""
  import torch

  return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
