"""The flag that commands share which write something new: whether an output that is there is replaced."""

from __future__ import annotations

from absl import flags

OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an output that is there already.")
