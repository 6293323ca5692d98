"""Define the flag --device, for all commands that run a model."""

from __future__ import annotations

from absl import flags

from sct import devices

_DEVICE = flags.DEFINE_enum(
    "device",
    "auto",
    list(devices.DEVICES),
    "Kind of device to run on; auto means the best one that JAX finds.",
)
_OPTION = "--device"


def select() -> None:
    """Choose the device for JAX. Call this function before JAX starts."""
    if _DEVICE.value != "auto":
        devices.select(_DEVICE.value, _OPTION)


def check() -> None:
    """Raise `ConfigError` if JAX does not run on the chosen device. The check starts JAX unless --device is auto."""
    devices.check(_DEVICE.value, _OPTION)
