"""Checkpoints: whole models as folders and single files, read strictly and never half-written."""

from .control import save_controlnet
from .embedding import load_embedding, save_embedding
from .errors import CheckpointError, TensorMismatch, TensorsNotFinite, first_line
from .files import get_shapes, read_json, read_tensors, write_json, write_tensors
from .folder import Parts, load_folder, save_folder
from .hub import download
from .lora import load_lora, save_lora
from .single import load_single, load_single_controlnet, save_single
from .source import load, load_controlnet
from .tokenizer import load_tokenizer, save_tokenizer

__all__ = ["CheckpointError", "Parts", "TensorMismatch", "TensorsNotFinite", "download", "first_line", "get_shapes",
           "load", "load_controlnet", "load_embedding", "load_folder", "load_lora", "load_single",
           "load_single_controlnet", "load_tokenizer", "read_json", "read_tensors", "save_controlnet",
           "save_embedding", "save_folder", "save_lora", "save_single", "save_tokenizer", "write_json",
           "write_tensors"]
