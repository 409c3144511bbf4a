"""Checkpoints of fairseq and Transformer-Clinic, the authors' own code, as Admin models with a tokenizer."""

from .conversion import convert
from .reading import FairseqCheckpoint, read_checkpoint
from .vocabulary import read_codes, read_dictionary


__all__ = ["FairseqCheckpoint", "convert", "read_checkpoint", "read_codes", "read_dictionary"]
