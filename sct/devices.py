"""Choose and check the kind of device on which JAX runs. JAX is imported only where it is needed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sct.checks import check_choice
from sct.errors import ConfigError
from sct.version import DISTRIBUTION

DEVICES = ("auto", "cpu", "gpu", "tpu")
_VARIABLE = "JAX_PLATFORMS"
_original: list[str] = []  # value of the variable before the first call of `select`


def select(device: str, option: str = "settings.device") -> None:
    """Choose the kind of device for JAX, before JAX starts. The choice replaces the variable JAX_PLATFORMS.

    Parameters
    ----------
    device
        One of `DEVICES`.
    option
        Name of the option in messages.
    """
    check_choice(option, device, DEVICES)
    if not _original:
        _original.append(os.environ.get(_VARIABLE, ""))
    # JAX looks for accelerators by itself and prefers them to the CPU. `check` then checks what JAX has found. If
    # "gpu" were named here, JAX would not start the CPU beside it, where parts of large models are kept.
    platforms = {"auto": _original[0], "cpu": "cpu"}.get(device, "")
    os.environ[_VARIABLE] = platforms
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_platforms", platforms or None)


def check(device: str, option: str = "settings.device", is_late: bool = False) -> None:
    """Start JAX, and raise `ConfigError` if JAX does not run on this kind of device. For "auto", do nothing.

    Parameters
    ----------
    device, option
        See `select`.
    is_late
        Whether JAX started with another choice before `select` was called.
    """
    if device == "auto":
        return
    import jax

    if jax.default_backend() == device:
        return
    if device == "cpu" or is_late:
        raise ConfigError(
            f"{option} is {device!r}, but JAX already runs on {described()}: set {option} before the first "
            "computation, or start Python again."
        )
    to_do = advice(device) or f"set {option} to {jax.default_backend()} or auto"
    raise ConfigError(f"{option} is {device!r}, but JAX finds only {described()}: {to_do}.")


def use(device: str, option: str = "settings.device") -> None:
    """Choose and check the kind of device.

    If JAX does not run on this kind of device, undo the choice and raise `ConfigError`.
    """
    variable, loaded = os.environ.get(_VARIABLE), sys.modules.get("jax")
    platforms = loaded.config.jax_platforms if loaded is not None else variable
    try:
        select(device, option)
        # Without a choice, JAX looked for all devices when it started, so an earlier call would not have helped.
        check(device, option, is_late=bool(platforms) and _is_started())
    except BaseException:
        if variable is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = variable
        if "jax" in sys.modules:
            import jax

            jax.config.update("jax_platforms", platforms or None)
        raise


def _is_started() -> bool:
    """Return whether JAX has chosen its devices. From then on, JAX_PLATFORMS has no effect."""
    # JAX has no public function for this that does not start JAX.
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bool(getattr(bridge, "backends_are_initialized", lambda: False)())


def described() -> str:
    """Return the devices of JAX as text, such as "2 GPU devices (NVIDIA H100)"."""
    import jax

    found = jax.devices()
    kinds = dict.fromkeys(str(each.device_kind) for each in found)
    names = f" ({', '.join(kinds)})" if list(kinds) != [found[0].platform] else ""
    return f"{len(found)} {found[0].platform.upper()} device{'s' * (len(found) > 1)}{names}"


def hardware() -> str:
    """Return the kind of accelerator of this machine, according to its device files: "gpu", "tpu" or "" for none."""
    files = {
        "gpu": [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("kfd")],
        "tpu": [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")],
    }
    return next((kind for kind, found in files.items() if found), "")


def advice(device: str) -> str:
    """Return advice for the case that JAX does not use an accelerator of the machine.

    Return "" if the machine does not have this kind of accelerator.
    """
    if hardware() != device:
        return ""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device == "gpu" and hidden is not None and hidden.strip() in ("", "-1"):
        return "the variable CUDA_VISIBLE_DEVICES hides the GPUs, so unset it"
    extra = {"gpu": "cuda", "tpu": "tpu"}[device]
    return f'install JAX for the {device.upper()} with pip install "{DISTRIBUTION}[{extra}]"'
