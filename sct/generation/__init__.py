"""Text generation with decoders: sampling, beam search, constrained decoding and scoring of candidate answers."""
