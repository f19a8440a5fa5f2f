"""The README.md beside a saved model: what it is, its arguments, and code that runs in its directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEADER = """---
library_name: memtrans
{pipeline}tags:
- memorizing-transformer
---
# {name}

A Memorizing Transformer ([Wu et al., ICLR 2022](https://arxiv.org/abs/2203.08913)): {layers} read an exact memory
of what the document said long ago. `config.json` holds its arguments{memories}.

```python
from memtrans import MemorizingTransformer{imports}

directory = "."  # this file's; from the hub: huggingface_hub.snapshot_download("user/name")
model = MemorizingTransformer.from_pretrained(directory)
{use}```

| argument | value |
| --- | --- |
"""
WRITES = """memories = {made}
tokens = generate(model, {texts}, tokens=20, memories=memories)
"""
READS = """memories = {made}
hidden = model(inputs_embeds=torch.zeros({rows}, 8, {dim}), knn_memories=memories)
"""


def model_card(name: str, config: Mapping[str, Any], documents: int | None) -> bytes:
    """The card of a model of that class.

    Args:
        name: of the class. config: its arguments.
        documents: how many the memories hold that were saved beside it; None where none were.
    """
    numbers = ", ".join(map(str, config["memorizing_layers"]))
    writes = config["num_tokens"] is not None and config["causal"]
    made = "model.create_knn_memories(batch_size=1)" if documents is None else "model.load_memories(directory)"
    first = config["clear_memories_on_sos_token_id"] or 0
    rows = documents or 1
    use = WRITES if writes else READS
    text = HEADER.format(
        pipeline="pipeline_tag: text-generation\n" if writes else "",
        name=name,
        layers=f"layers {numbers} of {config['depth']}" if numbers else f"none of its {config['depth']} layers",
        memories="" if documents is None else f", `memories.safetensors` a memory of {documents} documents",
        imports=", generate" if writes else "\nimport torch",
        use=use.format(made=made, dim=config["dim"], rows=rows, texts=[[first]] * rows),
    )
    return (text + "".join(f"| {argument} | {value} |\n" for argument, value in config.items())).encode()
