"""Fill a memory once and ask it many times: a document is read, saved with the model, and questions come later."""

import tempfile

import torch

from memtrans import MemorizingTransformer

SEGMENT = 128
torch.manual_seed(0)
model = MemorizingTransformer(
    num_tokens=256,
    dim=64,
    depth=2,
    heads=4,
    dim_head=16,
    memorizing_layers=(2,),
    max_knn_memories=4096,
    num_retrieved_memories=16,
).eval()


def encoded(text: str) -> torch.Tensor:
    return torch.tensor([list(text.encode())])  # (1, N)


document = " ".join(f"Chapter {number}. Here something happened." for number in range(40))
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    memories = model.create_knn_memories(batch_size=1)
    for segment in encoded(document).split(SEGMENT, dim=1):
        model(segment, memories)  # read once: each segment adds its keys and values
    model.save_pretrained(folder, memories=memories)

    model = MemorizingTransformer.from_pretrained(folder).eval()
    for question in ("What happened in chapter 7?", "And in chapter 30?"):
        memories = model.load_memories(folder)  # as it was after the document; the last question left nothing
        logits = model(encoded(question), memories)
        without = model(encoded(question), model.create_knn_memories(batch_size=1))
        moved = (logits - without)[0, -1].abs().max().item()
        print(f"{question} The document moves the next byte's logits by up to {moved:.3f}.")
