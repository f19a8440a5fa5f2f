"""Train on a book of your own, segment by segment, and let the model go on from its beginning.

python own_book.py my_book.txt 500     a text, and the number of steps
"""

import sys
from pathlib import Path

import torch

from memtrans import MemorizingTransformer, generate

SEGMENT, BATCH = 256, 4
device = "cuda" if torch.cuda.is_available() else "cpu"
book = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__)
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20

text = book.read_bytes()
text *= -(-BATCH * (SEGMENT + 1) // len(text))  # a short one is read several times
rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().to(device)
rows = rows[: rows.numel() // BATCH * BATCH].view(BATCH, -1)  # each row is read from its beginning to its end

torch.manual_seed(0)
model = MemorizingTransformer(
    num_tokens=256,
    dim=128,
    depth=4,
    heads=4,
    dim_head=32,
    memorizing_layers=(3,),
    max_knn_memories=8192,
    num_retrieved_memories=32,
).to(device)
memories = model.create_knn_memories(batch_size=BATCH)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

place = 0
for step in range(steps):
    if place + SEGMENT + 1 > rows.shape[1]:  # the book begins again, and nothing of it is remembered
        memories.clear_rows(torch.ones(BATCH, dtype=torch.bool))
        place = 0
    piece = rows[:, place : place + SEGMENT + 1]
    loss = model(piece[:, :-1], memories, labels=piece[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    place += SEGMENT
    if step % 10 == 0 or step == steps - 1:
        print(f"step {step}: {loss.item() / 0.6931:.2f} bits per byte")

(new,) = generate(model.eval(), [text[:400].decode("utf-8", "replace")], tokens=100, segment=SEGMENT, top_p=0.9)
print(bytes(new.tolist()).decode("utf-8", "replace"))
