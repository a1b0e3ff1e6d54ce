"""Typed configuration: YAML files, dotted overrides, and errors in one sentence.

A run is described by four sections: `model`, `mesh`, `data` and `training`. Every field is typed and described
here once; the command line and notebooks use the same objects.
"""

from foejax.config.files import config_folders, find_config, load_config, override_config, parse_config, save_config
from foejax.config.model import ModelConfig
from foejax.config.run import DataConfig, MeshConfig, RunConfig, TrainingConfig
from foejax.config.section import (
    ConfigError,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    parse_section,
)

__all__ = [
    "ConfigError",
    "DataConfig",
    "Fraction",
    "MeshConfig",
    "ModelConfig",
    "NonNegative",
    "NonNegativeFloat",
    "Positive",
    "PositiveFloat",
    "RunConfig",
    "Section",
    "TrainingConfig",
    "config_folders",
    "find_config",
    "load_config",
    "override_config",
    "parse_config",
    "parse_section",
    "save_config",
]
