"""Llama presets, building a GPTModel on any topology, and Hugging Face in and out."""
