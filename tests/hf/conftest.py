"""These tests need transformers, which the extra `memtrans[test]` brings."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("transformers") else ["test_*.py"]
