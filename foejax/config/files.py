"""Run configs as YAML files, and dotted overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from foejax.config.run import RunConfig, TrainingConfig
from foejax.config.section import ConfigError, parse_section


def config_folders() -> list[Path]:
    """Folders searched for config files given by name: the installed package's, then the checkout's."""
    package = Path(__file__).resolve().parents[1]
    return [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]


def find_config(name: str | Path) -> Path:
    """Path of a config file given as a path or as the name of a packaged config (`foe_tiny`).

    Raises:
      ConfigError: there is no such file; names the packaged configs.
    """
    path = Path(name)
    if path.is_file():
        return path
    stem = path.name.removesuffix(".yaml")
    for folder in config_folders():
        if (folder / f"{stem}.yaml").is_file() and path.parent in (Path("."), Path("configs")):
            return folder / f"{stem}.yaml"
    known = sorted({found.stem for folder in config_folders() for found in folder.glob("*.yaml")})
    raise ConfigError(f"config {str(name)!r} not found: give a path to a YAML file or one of {', '.join(known)}")


def load_config(source: str | Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a run config from YAML and apply dotted overrides.

    Args:
      source: a path, or the name of a packaged config such as `foe_tiny`.
      overrides: e.g. `{"model.num_groups": 4, "training.num_steps": 40}`; string values are read as YAML scalars.
        The file's warm-up and decay stretch with an overridden `training.num_steps`, unless they are overridden too.

    Raises:
      ConfigError: missing file, unknown key or impossible combination, in one sentence.
    """
    path = find_config(source)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} holds a {type(values).__name__}: a config is a mapping of sections")
    overrides = overrides or {}
    return parse_config(_with_overrides(values, _stretched_schedule(values, overrides) | overrides))


def parse_config(values: dict[str, Any]) -> RunConfig:
    """Validate a nested dict as a run config; raises ConfigError in one sentence."""
    return parse_section(RunConfig, values)


def override_config(config: RunConfig, overrides: dict[str, Any]) -> RunConfig:
    """A copy of `config` with dotted overrides applied and everything validated again."""
    return parse_config(_with_overrides(config.model_dump(), overrides))


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the whole config as YAML, so that a run folder describes itself."""
    Path(path).write_text(yaml.safe_dump(config.model_dump(), sort_keys=False), encoding="utf-8")


def _with_overrides(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    values = {key: dict(section) if isinstance(section, dict) else section for key, section in values.items()}
    for dotted, value in overrides.items():
        section, _, field = dotted.partition(".")
        if not field:
            raise ConfigError(f"override {dotted!r} names no field: write SECTION.FIELD, e.g. training.num_steps")
        entry = values.setdefault(section, {})
        if not isinstance(entry, dict):
            raise ConfigError(f"section {section!r} is not a mapping: it cannot take {dotted}={value}")
        entry[field] = _read_scalar(dotted, value)
    return values


def _stretched_schedule(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides that keep the shape of a file's learning-rate schedule under another number of steps."""
    section = values.get("training")
    section = section if isinstance(section, dict) else {}
    num_steps = _read_scalar("training.num_steps", overrides.get("training.num_steps"))
    names = ("num_steps", "warmup_steps", "decay_start_step")
    planned, *steps = (section.get(name, TrainingConfig.model_fields[name].default) for name in names)
    if not all(isinstance(value, int) and value >= 0 for value in (num_steps, planned, *steps)) or not planned:
        return {}  # what is wrong with them is found when the config is validated
    return {f"training.{name}": step * num_steps // planned for name, step in zip(names[1:], steps, strict=True)}


def _read_scalar(field: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value) if "e" in value.lower() and _is_float(value) else yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{field}={value!r} is not a YAML value: quote it") from error


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
