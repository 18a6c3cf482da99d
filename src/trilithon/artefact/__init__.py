"""Compiled models on disk: programs, weights, what they take, the guards, and the report with its proofs, in one folder."""

from trilithon.artefact.loading import is_artefact, load, tokenizer_folder
from trilithon.artefact.saving import save

__all__ = ["is_artefact", "load", "save", "tokenizer_folder"]
