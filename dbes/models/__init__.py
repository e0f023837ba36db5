"""Checkpoints: checks of a folder, loading with every tensor accounted for, and what identifies a model."""

from dbes.models.classes import build, text_config_of
from dbes.models.folder import check_folder, has_adapter
from dbes.models.identity import folder_fingerprint, model_fingerprint, tokenizer_fingerprint
from dbes.models.load import LoadedModel, find_commit, load_config, load_model, load_tokenizer, load_weights, transformers_model
from dbes.models.sites import find_sites

__all__ = [
    "LoadedModel",
    "build",
    "check_folder",
    "find_commit",
    "find_sites",
    "folder_fingerprint",
    "has_adapter",
    "load_config",
    "load_model",
    "load_tokenizer",
    "load_weights",
    "model_fingerprint",
    "text_config_of",
    "tokenizer_fingerprint",
    "transformers_model",
]
