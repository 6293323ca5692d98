"""Represent cells as text: cell sentences, prompt templates, instructions and tokenizers."""
