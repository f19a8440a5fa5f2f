"""These tests need transformers, which the extra `memtrans[test]` brings; what is promised without it needs nothing."""

import importlib.util
from pathlib import Path

WITHOUT = "test_without_transformers.py"

collect_ignore = (
    []
    if importlib.util.find_spec("transformers")
    else [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name != WITHOUT]
)
