"""Text from decoders: a compiled loop over a cache of keys and values, sampling, beams, candidates, constraints."""
