"""Generate text with decoders, by sampling, beam search or constrained decoding, and score candidate answers."""
