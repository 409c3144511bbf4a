"""Converts checkpoints of fairseq and Transformer-Clinic, the code of Admin's authors, to Admin models."""

from .conversion import convert
from .reading import FairseqCheckpoint, read_checkpoint
from .vocabulary import read_codes, read_dictionary


__all__ = ["FairseqCheckpoint", "convert", "read_checkpoint", "read_codes", "read_dictionary"]
