"""Read and write Hugging Face folders: configurations, weights and parameter names."""
