"""What the contenders of several operations share: who is there, and what to call him if he is not."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from experiments.kernel_bench.operations import Contender, Operands, first_line

NEEDS_GPU = "needs an NVIDIA GPU"

Steps = Mapping[str, Callable[..., Any]]


def own_backend(
    operation: str,
    name: str,
    on_gpu: bool,
    steps: Callable[[ModuleType], Steps],
    refuses: Callable[[ModuleType, str, Any], str | None] = lambda module, step, dims: None,
    remark: str = "",
) -> Contender:
    """A backend of `pallas_kernels`, called as itself; "xla" runs on every device.

    Args:
      steps: of its module.
      refuses: (module, step, dims) -> why it cannot take them.
    """
    missing = None if on_gpu or name == "xla" else NEEDS_GPU
    if missing is None:
        try:
            module = importlib.import_module(f"pallas_kernels.{operation}.{name}")
            return Contender(
                name, "ours", steps(module), refuses=lambda step, dims: refuses(module, step, dims), remark=remark
            )
        except Exception as error:  # whatever a missing or mismatched library raises
            missing = first_line(error)
    return Contender(name, "ours", {}, missing=missing)


def torch_peer(
    name: str,
    on_gpu: bool,
    steps: Callable[[Any], Steps],
    *,
    needs: str | None = None,
    prepare: Callable[[Any, str, Operands], Operands] = lambda torch, step, operands: operands,
    remark: str = "",
) -> Contender:
    """What PyTorch has for the work; in a dry run on the CPU, if it is installed.

    Args:
      steps: of the imported torch.
      needs: a function of torch without which it cannot run.
      prepare: (torch, step, operands) -> its own form of the operands, made outside the timed region.
    """
    try:
        import torch

        if needs is not None and not hasattr(torch, needs):
            missing = f"torch {torch.__version__} has no {needs}"
        elif on_gpu and not torch.cuda.is_available():
            missing = "torch sees no GPU"
        else:
            return Contender(
                name,
                "peer",
                steps(torch),
                framework="torch",
                prepare=lambda step, operands: prepare(torch, step, operands),
                remark=remark,
            )
    except Exception as error:  # a torch of another CUDA fails in its loader
        missing = first_line(error)
    return Contender(name, "peer", {}, framework="torch", missing=missing)
