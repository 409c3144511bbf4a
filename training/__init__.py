"""The training recipe behind run_translation.py."""
