"""Text to batches: corpora, tokenizers, the held-out split, packing, and the resumable loader."""

from foejax.data.corpora import fetch_corpus, list_corpora, read_manifest
from foejax.data.dataset import Dataset, load_tokenizer, open_dataset
from foejax.data.documents import Document, read_documents
from foejax.data.errors import DataError
from foejax.data.loader import TrainIterator
from foejax.data.packing import Batch
from foejax.data.tokenizer import Tokenizer, token_byte_lengths

__all__ = [
    "Batch",
    "DataError",
    "Dataset",
    "Document",
    "Tokenizer",
    "TrainIterator",
    "fetch_corpus",
    "list_corpora",
    "load_tokenizer",
    "open_dataset",
    "read_documents",
    "read_manifest",
    "token_byte_lengths",
]
