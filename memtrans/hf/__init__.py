"""A kNN memory in the layers of a pretrained Hugging Face causal language model; see docs/hf.md.

    model = AutoModelForCausalLM.from_pretrained(directory)
    memory = add_memory(model)
    memory.read(tokenizer(book, return_tensors="pt").input_ids)                 # any length
    model.generate(**tokenizer(question, return_tensors="pt"))                  # searches, never writes

Needs `transformers`, which the extra `memtrans[hf]` installs. Nothing outside this package imports it.
"""

# Where to read on: `add_memory` asks whether a model can have what it is asked for (settings, families, probe) and
# makes a `ModelMemory` (model_memory), which callers talk to between passes. That is made of the contexts it is inside
# of (scope), of what it holds for documents (held, entries) and of readers (reading); its files are two (saved).
# A pass of the model goes through hooks, which hand its layers a state (state, masks, rotation); attention asks the
# memory in each of them as was learned (layer_memory), and tells who watches (telling).

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
