"""The training recipe of run_translation.py."""
