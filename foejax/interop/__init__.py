"""Interchange with Hugging Face folders: matched MoE models as OLMoE, FoE and Multi-Head LatentMoE as our own kinds."""

from foejax.interop.errors import ExportError, InterchangeError, ModelFolderError
from foejax.interop.exporter import export_model
from foejax.interop.importer import import_config, import_model, import_tokenizer_path
from foejax.interop.tensor_names import ModelType

__all__ = [
    "ExportError",
    "InterchangeError",
    "ModelFolderError",
    "ModelType",
    "export_model",
    "import_config",
    "import_model",
    "import_tokenizer_path",
]
