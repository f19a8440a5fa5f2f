"""What was said 20,000 tokens ago is completed from the memory, and without it not at all."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import pytest
import torch

from memtrans import MemorizingTransformer
from memtrans.data.recall import LETTERS, NAME_LENGTH
from memtrans.generation.decoder import Decoder
from memtrans.presets import PRESETS
from memtrans.training.data import open_data
from memtrans.training.model import build_model
from memtrans.training.trainer import Trainer

DOCUMENTS, LENGTH, DISTANCE = 8, 8, 20_000
SETTINGS = PRESETS["recall"]


@dataclasses.dataclass(frozen=True)
class Planted:
    """A text that states a random string, a letter under each name, and speaks of other names since."""

    text: bytes
    names: list[str]
    string: str

    @classmethod
    def draw(cls, generator: random.Random) -> Planted:
        names = generator.sample([a + b for a in LETTERS for b in LETTERS], len(LETTERS) ** NAME_LENGTH)
        planted, others = names[:LENGTH], names[LENGTH:]
        string = "".join(generator.choice(LETTERS) for _ in planted)
        stated = "".join(f"{name}={letter};" for name, letter in zip(planted, string, strict=True))
        rest = "".join(f"{generator.choice(others)}={generator.choice(LETTERS)};" for _ in range(DISTANCE // 5))
        return cls((stated + rest).encode(), planted, string)


def ids(texts: Iterator[str] | list[bytes]) -> list[torch.Tensor]:
    return [torch.tensor(list(text if isinstance(text, bytes) else text.encode())) for text in texts]


def completed(model: MemorizingTransformer, planted: list[Planted], forget: bool = False) -> list[str]:
    """Each text's string as the model writes it, letter by letter, after it has read the text."""
    decoder = Decoder(model, len(planted), segment=SETTINGS.segment)
    decoder.read(ids([one.text for one in planted]))
    assert decoder.memories[0].lengths.min() > DISTANCE - SETTINGS.segment
    if forget:
        decoder.memories.clear_memory()
    strings = [""] * len(planted)
    for place in range(LENGTH):
        logits = decoder.read(ids(f"{one.names[place]}?" for one in planted))
        letters = [chr(letter) for letter in logits.argmax(dim=-1).tolist()]
        decoder.read(ids(f"{letter};" for letter in letters))
        strings = [string + letter for string, letter in zip(strings, letters, strict=True)]
    return strings


def share(strings: list[str], planted: list[Planted]) -> float:
    right = [
        a == b for string, one in zip(strings, planted, strict=True) for a, b in zip(string, one.string, strict=True)
    ]
    return sum(right) / len(right)


# ------------------------------------------------------------------------------------------------ a model wired by hand

VALUES, ASK, FILLER = len(LETTERS), 208, 216  # token 26 i + v states letter v under name i, 208 + i asks for it


@torch.no_grad()
def wired() -> MemorizingTransformer:
    """Embeddings are a unit for the name and one for the letter; a query is its name, a key too, a value its letter."""
    model = MemorizingTransformer(
        num_tokens=256, dim=64, depth=1, dim_head=32, heads=1, memorizing_layers=1, max_knn_memories=2**15,
        num_retrieved_memories=4, pad_id=-1,
    ).eval()  # fmt: skip
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            for weight in module.parameters():
                weight.zero_()
    tokens, names, letters = torch.arange(ASK), torch.arange(LENGTH), torch.arange(VALUES)
    attention = model.layers[0][0].fn
    embedding, place_of_letters = model.token_emb.weight, LENGTH + 1
    embedding[tokens, tokens // VALUES] = 1.0
    embedding[tokens, place_of_letters + tokens % VALUES] = 1.0
    embedding[ASK + names, names] = 1.0
    embedding[FILLER:, LENGTH] = 1.0
    attention.to_q.weight[names, names] = 1.0
    attention.to_kv.weight[names, names] = 1.0
    attention.to_kv.weight[attention.dim_head + letters, place_of_letters + letters] = 1.0
    attention.to_out.weight[place_of_letters + letters, letters] = 9.0
    model.to_logits[1].weight[letters, place_of_letters + letters] = 1.0
    return model


def test_a_model_wired_to_look_names_up_completes_the_string_with_its_memory_and_not_without():
    generator = random.Random(0)
    string = [generator.randrange(VALUES) for _ in range(LENGTH)]
    stated = [VALUES * name + letter for name, letter in enumerate(string)]
    text = torch.tensor([*stated, *(generator.randrange(FILLER, 256) for _ in range(DISTANCE))])
    decoder = Decoder(wired(), 1, segment=256)
    decoder.read([text])
    found, forgotten = [], []
    for name in range(LENGTH):
        found.append(int(decoder.read([torch.tensor([ASK + name])]).argmax()))
    decoder.memories.clear_memory()
    for name in range(LENGTH):
        forgotten.append(int(decoder.read([torch.tensor([ASK + name])]).argmax()))
    assert found == string
    assert sum(written == letter for written, letter in zip(forgotten, string, strict=True)) <= 1


# --------------------------------------------------------------------------------------------------- a trained model


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_string_stated_20_000_tokens_ago_is_completed_with_the_memory_and_not_without():
    """The recall preset is trained on distances up to 3,000; then its memory grows, and queries take 2 neighbours."""
    trainer = Trainer(SETTINGS, open_data(SETTINGS), torch.device("cpu"))
    for _ in range(SETTINGS.steps):
        trainer.advance()
    model = build_model(dataclasses.replace(SETTINGS, memory=2**15, neighbours=2)).eval()
    model.load_state_dict(trainer.model.state_dict())
    generator = random.Random("planted")
    planted = [Planted.draw(generator) for _ in range(DOCUMENTS)]
    with_memory = completed(model, planted)
    assert sum(string == one.string for string, one in zip(with_memory, planted, strict=True)) >= DOCUMENTS - 2
    assert share(with_memory, planted) > 0.95
    assert share(completed(model, planted, forget=True), planted) < 0.2
