"""Hugging Face folders: configurations, weights and parameter names."""
