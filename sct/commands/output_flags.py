"""The flag of all commands that write a new file or folder: whether an existing one is replaced."""

from __future__ import annotations

from absl import flags

OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an output that already exists.")
