"""Cells as text: cell sentences, prompt templates and tokenizers."""
