"""Read and write adapters in the format of the Hugging Face PEFT library."""
