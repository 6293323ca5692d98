"""Memory and disk: what a piece of work needs at most, and how fast files are read."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

_STATUS, _CLEAR, _IO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/self/io")
_SAMPLE_SECONDS = 0.02
_READ_BYTES = 8 << 20


def _status(field: str) -> int:
    """Bytes of an entry of this process's status; 0 where the system has none."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def host_bytes() -> int:
    """Memory that this process holds now; 0 where the system does not say."""
    return _status("VmRSS")


class HostPeak:
    """Largest memory of this process while the context is open, in `bytes`; `how` says from what it is known.

    "VmHWM" is the kernel's own mark, set back on entry; "sampled" the largest of the samples of a thread, where
    the mark cannot be set back; "whole process" the largest of all its life, where the system knows no other.
    What was freed before is given back to the system on entry, so that the peak is that of what follows.
    """

    def __init__(self) -> None:
        self.bytes, self.how, self.before = 0, "whole process", 0
        self._sampled = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> HostPeak:
        gc.collect()
        libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
        if libc is not None and hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        self.before = host_bytes()
        if not self.before:
            return self
        try:
            _CLEAR.write_text("5")
            self.how = "VmHWM"
        except OSError:
            self.how = "sampled"
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.how == "whole process":
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            self.bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            return
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
        self.bytes = _status("VmHWM") if self.how == "VmHWM" else max(self._sampled, host_bytes())

    def _sample(self) -> None:
        while not self._stop.is_set():
            self._sampled = max(self._sampled, host_bytes())
            time.sleep(_SAMPLE_SECONDS)


def device_peak() -> int | None:
    """Largest memory in use so far on any device of this process; None where a backend does not count it (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [int(peak) for peak in peaks if peak]
    return max(known) if known else None


def memory_of(compiled: Any) -> dict[str, int | None]:
    """Bytes per device that a compiled program plans for, where the backend says."""
    analysis = compiled.memory_analysis()
    names = {"temporaries": "temp", "arguments": "argument", "outputs": "output", "aliased": "alias"}
    return {
        f"{name}_bytes": None if analysis is None else int(getattr(analysis, f"{field}_size_in_bytes"))
        for name, field in names.items()
    }


def flops_of(compiled: Any) -> float | None:
    """Operations that XLA counts in a compiled program: loops once, products inside library calls not at all."""
    analysis = compiled.cost_analysis()
    if isinstance(analysis, list):
        analysis = analysis[0] if analysis else None
    return float(analysis["flops"]) if analysis and "flops" in analysis else None


def files_below(folders: Iterable[Path]) -> list[Path]:
    """All files below some folders, in a fixed order."""
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())


def forget(files: Iterable[Path]) -> None:
    """Ask the system to drop files from its page cache, as far as it can be asked."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        # Some file systems cannot; whether the files were read from the disk is counted when they are read.
        with suppress(OSError):
            if hasattr(os, "posix_fadvise"):
                os.fsync(descriptor)  # pages that are not written yet are not dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _read_from_disk() -> int | None:
    """Bytes that the storage layer has fetched for this process."""
    try:
        lines = _IO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def sequential_read(files: Iterable[Path]) -> tuple[float, str]:
    """Bytes per second of reading files one after the other, once, and from where they came.

    The second part is "disk", "page cache" or "unknown"; a file system whose reads the kernel does not account to
    the process looks like a page cache.
    """
    files = list(files)
    forget(files)
    buffer = bytearray(_READ_BYTES)
    before, start, total = _read_from_disk(), time.perf_counter(), 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    seconds = time.perf_counter() - start
    after = _read_from_disk()
    rate = total / max(seconds, 1e-9)
    if before is None or after is None:
        return rate, "unknown"
    return rate, "disk" if after - before > 0.5 * total else "page cache"
