"""Facts about the machine and the software, as a result must name them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

_PACKAGES = ("foejax", "jax", "jaxlib", "jax-cuda13-plugin", "httpx")


def machine_facts(command: str) -> dict[str, Any]:
    """Devices of JAX, versions and command."""
    import jax

    device = jax.devices()[0]
    versions = [f"{name} {version}" for name in _PACKAGES if (version := _version(name))]
    found = {
        "on_gpu": device.platform == "gpu",
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "software": ", ".join([f"Python {platform.python_version()}", *versions]),
        "command": command,
    }
    flags = os.environ.get("XLA_FLAGS", "")
    return found | ({"XLA_FLAGS": flags} if flags else {})


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
