"""Adapters in the format of the PEFT library."""
