"""Read and write model folders, and convert models from and to other formats."""
