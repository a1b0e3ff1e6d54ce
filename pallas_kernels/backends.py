"""Which backend serves an operation: the one asked for, or the first that the default device and the operands allow.

A backend is a module `pallas_kernels/<operation>/<name>.py`. It is imported when first used, because some need packages
that are no part of the base install (the extra `foejax[<name>]`).
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import jax

logger = logging.getLogger("pallas_kernels")

Refuse = Callable[[ModuleType], str | None]
"""Given a backend's module: why it cannot take the operands, as a clause that names the backend, or None."""


def load_backend(operation: str, name: str) -> ModuleType:
    """The backend's module; raises whatever its import raises."""
    return importlib.import_module(f"pallas_kernels.{operation}.{name}")


def require_backend(operation: str, name: str, choices: Sequence[str], refuse: Refuse, error: type[ValueError]) -> str:
    """`name`, after a check that it can serve.

    Args:
      operation: folder of the operation.
      name: the backend asked for.
      choices: names of all backends of the operation.
      refuse: asked of the backend, and of the others for the message.
      error: what to raise.

    Raises:
      error: the name is unknown, its packages are missing, or it cannot take the operands.
    """
    if name not in choices:
        raise error(f"implementation={name!r}: choose one of {tuple(choices)} or None")
    reason = _refusal(operation, name, refuse)
    if reason is not None:
        able = [choice for choice in choices if _refusal(operation, choice, refuse) is None]
        raise error(f"implementation={name!r}: {reason}; these can: {', '.join(able)}")
    return name


def pick_backend(operation: str, preferred: Mapping[str, Sequence[str]], refuse: Refuse, operands: str) -> str:
    """The first backend preferred for the default device that takes the operands, else `xla`; logged once.

    Args:
      operation: folder of the operation.
      preferred: names for each kind of device, best first; see `device_kind`.
      refuse: asked of each in turn.
      operands: dtype and shapes in words, for the log.
    """
    kind, refusals = device_kind(), []
    for choice in preferred.get(kind, ()):
        reason = _refusal(operation, choice, refuse)
        if reason is None:
            break
        refusals.append(reason)
    else:
        choice = "xla"
    _log_choice(operation, operands, kind, "; ".join([choice, *refusals]))
    return choice


def device_kind() -> str:
    """`hopper` (an H100 or H200), `cuda` (another NVIDIA GPU), or the default device's platform."""
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; an AMD GPU's is a name
    if device.platform != "gpu" or not capability[:1].isdigit():
        return device.platform
    return "hopper" if capability.startswith("9.") else "cuda"


def _refusal(operation: str, name: str, refuse: Refuse) -> str | None:
    try:
        backend = load_backend(operation, name)
    except Exception as error:  # besides ImportError whatever versions that do not fit happen to raise
        return f"{name} needs the extra foejax[{name}] ({error})"
    return refuse(backend)


@functools.cache
def _log_choice(operation: str, operands: str, kind: str, choice: str) -> None:
    """Cached, so that each choice is logged once."""
    logger.info("%s of %s on %s: %s", operation, operands, kind, choice)
