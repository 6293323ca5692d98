"""Define the flag --overwrite for all commands that write a file or folder."""

from __future__ import annotations

from absl import flags

OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an output that already exists.")
