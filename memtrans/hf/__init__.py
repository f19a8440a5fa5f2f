"""A kNN memory in the layers of a pretrained Hugging Face causal language model; see docs/hf.md.

    model = AutoModelForCausalLM.from_pretrained(directory)
    memory = add_memory(model)
    memory.read(tokenizer(book, return_tensors="pt").input_ids)                 # any length
    model.generate(**tokenizer(question, return_tensors="pt"))                  # searches, never writes

Needs `transformers`, which the extra `memtrans[hf]` installs. Nothing outside this package imports it.
"""

try:
    import transformers
except ImportError as error:
    raise ImportError("memtrans.hf needs transformers 5 or newer: pip install 'memtrans[hf]'") from error

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(
        f"memtrans.hf needs transformers 5 or newer, got {transformers.__version__}: pip install -U 'memtrans[hf]'"
    )

from memtrans.hf.add_memory import add_memory, load_memory, memory_of
from memtrans.hf.calibrate import calibrate
from memtrans.hf.facts import Words
from memtrans.hf.model_memory import ModelMemory
from memtrans.hf.trainer import MemoryCallback, document_rows

__all__ = [
    "MemoryCallback",
    "ModelMemory",
    "Words",
    "add_memory",
    "calibrate",
    "document_rows",
    "load_memory",
    "memory_of",
]
