"""Alignment of vision-language models (CLIP-ViT + projector + LLaMA) in JAX."""
