"""Folders of Hugging Face: architectures, arrays and where each parameter lies."""
