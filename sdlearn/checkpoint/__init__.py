"""Checkpoints: whole models as folders and single files, read strictly and never half-written."""

from .errors import CheckpointError, TensorMismatch, TensorsNotFinite, sentence
from .files import read_json, read_tensors, shapes, write_json, write_tensors, written_beside
from .folder import Parts, load_folder, save_folder
from .hub import download
from .single import load_single, load_single_controlnet, save_single
from .source import load

__all__ = ["CheckpointError", "Parts", "TensorMismatch", "TensorsNotFinite", "download", "load", "load_folder",
           "load_single", "load_single_controlnet", "read_json", "read_tensors", "save_folder", "save_single",
           "sentence", "shapes", "write_json", "write_tensors", "written_beside"]
