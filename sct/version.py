"""The version, written into every file that the project makes."""

__version__ = "0.1.0"
