"""Plots draw into memory, and no figure stays open."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_window(monkeypatch):
    """Draw into memory, and keep no figure."""
    matplotlib = pytest.importorskip("matplotlib", reason="plots need matplotlib: make install brings it")
    import matplotlib.pyplot as plt

    backend = matplotlib.get_backend()
    plt.switch_backend("agg")
    before = dict(matplotlib.rcParams)
    monkeypatch.setattr(plt, "show", lambda *_, **__: pytest.fail("a plot was shown"))
    yield
    assert dict(matplotlib.rcParams) == before
    plt.close("all")
    plt.switch_backend(backend)
