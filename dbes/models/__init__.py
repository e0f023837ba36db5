"""Checkpoints: checks of a folder, loading with every tensor accounted for, and what identifies a model."""

from dbes.models.classes import build, text_config_of
from dbes.models.folder import check_folder, has_adapter
from dbes.models.identity import folder_fingerprint, model_fingerprint, tokenizer_fingerprint
from dbes.models.load import LoadedModel, find_commit, load_config, load_model, load_tokenizer, load_weights, transformers_model
from dbes.models.sites import RoutingSite, base_of, find_sites, input_device, is_offloaded, max_positions

__all__ = [
    "LoadedModel",
    "RoutingSite",
    "base_of",
    "build",
    "check_folder",
    "find_commit",
    "find_sites",
    "folder_fingerprint",
    "has_adapter",
    "input_device",
    "is_offloaded",
    "load_config",
    "load_model",
    "load_tokenizer",
    "load_weights",
    "max_positions",
    "model_fingerprint",
    "text_config_of",
    "tokenizer_fingerprint",
    "transformers_model",
]
