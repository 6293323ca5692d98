"""Measure peak memory and the read speed of the disk."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

_STATUS, _CLEAR, _IO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/self/io")
_SAMPLE_SECONDS = 0.02
_READ_BYTES = 8 << 20


def _status(field: str) -> int:
    """Return an entry of /proc/self/status in bytes, or 0 if the system has no such entry."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def host_bytes() -> int:
    """Return the current memory use of this process in bytes, or 0 if the system does not report it."""
    return _status("VmRSS")


class HostPeak:
    """Context manager that measures the peak memory of this process.

    `bytes` is the peak, `before` is the memory on entry in bytes, and `how` is the method. "VmHWM" is the kernel's
    counter, which is reset on entry. "sampled" is the maximum of regular samples, used if the counter cannot be reset.
    "whole process" is the peak since the start of the process, used if the system offers no other measure. On entry,
    freed memory is returned to the system, so that the peak only includes later work.
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
    """Return the peak memory use in bytes over all local devices, or None if the backend does not report it (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [int(peak) for peak in peaks if peak]
    return max(known) if known else None


def memory_of(compiled: Any) -> dict[str, int | None]:
    """Return the bytes per device that XLA plans for a compiled program, as a dict by kind of memory.

    Values are None if unknown.
    """
    analysis = compiled.memory_analysis()
    names = {"temporaries": "temp", "arguments": "argument", "outputs": "output", "aliased": "alias"}
    return {
        f"{name}_bytes": None if analysis is None else int(getattr(analysis, f"{field}_size_in_bytes"))
        for name, field in names.items()
    }


def planned_bytes(needs: Mapping[str, int | None]) -> int | None:
    """Return the bytes that a program needs on a device while it runs; None if unknown.

    `needs` is the result of `memory_of`. Donated arguments and the outputs that replace them use the same memory.
    """
    if any(value is None for value in needs.values()):
        return None
    parts = {name: value or 0 for name, value in needs.items()}
    arguments, outputs = parts["arguments_bytes"], parts["outputs_bytes"]
    return parts["temporaries_bytes"] + arguments + outputs - parts["aliased_bytes"]


def flops_of(compiled: Any) -> float | None:
    """Return XLA's operation count of a program.

    XLA counts the body of a loop once, and does not count library calls.
    """
    analysis = compiled.cost_analysis()
    if isinstance(analysis, list):
        analysis = analysis[0] if analysis else None
    return float(analysis["flops"]) if analysis and "flops" in analysis else None


def files_below(folders: Iterable[Path]) -> list[Path]:
    """Return the sorted paths of all files in some folders and their subfolders."""
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())


def forget(files: Iterable[Path]) -> None:
    """Ask the system to drop files from its page cache. Some systems do not support this request."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        # A failure is harmless: `sequential_read` checks whether files really came from the disk.
        with suppress(OSError):
            if hasattr(os, "posix_fadvise"):
                os.fsync(descriptor)  # pages are only dropped after they are written to disk
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _read_from_disk() -> int | None:
    """Return the number of bytes that this process has read from storage, or None if the system does not report it."""
    try:
        lines = _IO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def sequential_read(files: Iterable[Path]) -> tuple[float, str]:
    """Read files once, one after the other. Return the bytes per second and the source of the data.

    The source is "disk", "page cache" or "unknown". If the kernel does not count the reads from a file system, the
    source is reported as "page cache".
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
