"""Load a folder within a limit of memory beyond what the process has before; run as a program.

Arguments: folder, "mesh" or "single", bytes. The limit is on memory of the process itself: pages of files, which the
system takes back when it needs them, do not count.
"""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import sct
from sct.train.sharding import MeshConfig, make_mesh
from sct.weights.hf import folder as hf


def limit(more: int) -> None:
    """Let the process have so many bytes more."""
    status = Path("/proc/self/status").read_text()
    now = 1024 * int(re.search(r"VmData:\s+(\d+) kB", status)[1])
    resource.setrlimit(resource.RLIMIT_DATA, (now + more, now + more))


if __name__ == "__main__":
    folder, where, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)) if where == "mesh" else None
    # Libraries and threads that the first arrays start.
    sct.load(folder.with_name("small"), mesh=mesh)
    jax.block_until_ready(jnp.ones(3) + 1)
    limit(size)
    model = hf.load(folder, mesh=mesh)
    jax.block_until_ready(model.variables)
    print(model.size)
