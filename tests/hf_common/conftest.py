# These tests run inside the library's own test folder only: see tests/test_hf_common.py.
collect_ignore_glob = ["test_*.py"]
