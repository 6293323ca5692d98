"""What keeps a long session of tests alive."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests.conftest import drop_programs

MAPS = Path("/proc/self/maps")


@pytest.mark.slow
@pytest.mark.skipif(not MAPS.exists(), reason="only Linux says how many maps of memory a process has")
def test_compiled_programs_are_dropped_where_they_take_too_many_maps():
    programs = [jax.jit(lambda x, i=i: jnp.tanh(x * i)) for i in range(40)]
    for i, program in enumerate(programs):
        program(jnp.ones((i + 2, 3)))
    before = MAPS.read_bytes().count(b"\n")
    assert not drop_programs(before + 1000)
    assert drop_programs(before - 1)
    assert MAPS.read_bytes().count(b"\n") < before - 40
    assert programs[3](jnp.ones((5, 3))).shape == (5, 3)
