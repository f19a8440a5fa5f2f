"""A layer with a memory in a decoder of your own: the block of layer 2 attends to its document's past, too."""

import torch
from torch import nn

from memtrans import Attention, KNNAttention, KNNMemory

DIM, HEADS, HEAD_DIM, SEGMENT = 64, 4, 16, 64


class Decoder(nn.Module):
    def __init__(self, vocabulary: int, depth: int = 3, memorizing: int = 1) -> None:
        super().__init__()
        self.memorizing = memorizing
        self.embed = nn.Embedding(vocabulary, DIM)
        sizes = {"dim": DIM, "heads": HEADS, "dim_head": HEAD_DIM}
        self.attend = nn.ModuleList(
            KNNAttention(**sizes, num_retrieved_memories=16) if layer == memorizing else Attention(**sizes)
            for layer in range(depth)
        )
        self.feed = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
            for _ in range(depth)
        )
        self.read = nn.Linear(DIM, vocabulary)

    def forward(self, tokens: torch.Tensor, memory: KNNMemory) -> torch.Tensor:
        hidden = self.embed(tokens)  # (B, N, dim)
        for layer, (attend, feed) in enumerate(zip(self.attend, self.feed, strict=True)):
            if layer == self.memorizing:
                out, _ = attend(hidden, knn_memory=memory)  # searched, attended, then added N entries
            else:
                out, _ = attend(hidden)
            hidden = hidden + out
            hidden = hidden + feed(hidden)
        return self.read(hidden)  # (B, N, vocabulary)


torch.manual_seed(0)
text = torch.frombuffer(bytearray(b"the memory of a document grows as it is read. " * 64), dtype=torch.uint8).long()
documents = torch.stack([text[: 16 * SEGMENT + 1]] * 2)  # two documents of 16 segments
model = Decoder(vocabulary=256)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for epoch in range(3):
    memory = KNNMemory(dim=HEAD_DIM, max_memories=4096, num_indices=2)  # empty: the documents begin again
    for begin in range(0, 16 * SEGMENT, SEGMENT):
        piece = documents[:, begin : begin + SEGMENT + 1]
        logits = model(piece[:, :-1], memory)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.2f}")
