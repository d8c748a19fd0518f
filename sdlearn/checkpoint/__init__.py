"""Checkpoints: whole models as folders that diffusers opens too, read strictly and never half-written."""

from .errors import CheckpointError, TensorMismatch, sentence
from .files import read_json, read_tensors, shapes, write_json, write_tensors, written_beside
from .folder import Parts, load_folder, save_folder

__all__ = ["CheckpointError", "Parts", "TensorMismatch", "load_folder", "read_json", "read_tensors",
           "save_folder", "sentence", "shapes", "write_json", "write_tensors", "written_beside"]
