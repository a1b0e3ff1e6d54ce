"""What interchange refuses; every message names the field, its value and the way out."""

from __future__ import annotations


class InterchangeError(ValueError):
    """A model and a Hugging Face folder that do not fit each other."""


class ExportError(InterchangeError):
    """A model that the asked-for format cannot express, or a folder that cannot be written."""


class ModelFolderError(InterchangeError):
    """A folder that is not a complete model of a kind we read."""
