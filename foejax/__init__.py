"""Federation-of-Experts language models in JAX, next to matched mixture-of-experts baselines.

    import foejax

    foejax.simulate_devices(8)                                  # a laptop as eight devices; leave out on GPUs
    config = foejax.load_config("foe_tiny", {"training.num_steps": 100})
    result = foejax.train(config, "runs/first")
    loaded = foejax.load("runs/first")
    print(loaded.generate("To be, or", max_new_tokens=40)[0])

Names are imported when they are first used, so that `simulate_devices` can come before JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foejax.analysis.accounting import account
    from foejax.analysis.comms import communication_report
    from foejax.api import LoadedModel, build, export, import_folder, load
    from foejax.config import ConfigError, RunConfig, load_config
    from foejax.data import DataError, open_dataset
    from foejax.devices import simulate_devices
    from foejax.evaluation.evaluate import evaluate
    from foejax.models import LanguageModel
    from foejax.serving.llm import LLM
    from foejax.serving.sampling_params import SamplingParams
    from foejax.training.loop import train

_HOMES = {
    "ConfigError": "foejax.config",
    "DataError": "foejax.data",
    "LLM": "foejax.serving.llm",
    "LanguageModel": "foejax.models",
    "LoadedModel": "foejax.api",
    "RunConfig": "foejax.config",
    "SamplingParams": "foejax.serving.sampling_params",
    "account": "foejax.analysis.accounting",
    "build": "foejax.api",
    "communication_report": "foejax.analysis.comms",
    "evaluate": "foejax.evaluation.evaluate",
    "export": "foejax.api",
    "import_folder": "foejax.api",
    "load": "foejax.api",
    "load_config": "foejax.config",
    "open_dataset": "foejax.data",
    "simulate_devices": "foejax.devices",
    "train": "foejax.training.loop",
}

__all__ = [
    "ConfigError",
    "DataError",
    "LLM",
    "LanguageModel",
    "LoadedModel",
    "RunConfig",
    "SamplingParams",
    "account",
    "build",
    "communication_report",
    "evaluate",
    "export",
    "import_folder",
    "load",
    "load_config",
    "open_dataset",
    "simulate_devices",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'foejax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
