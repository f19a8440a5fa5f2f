"""What 48195b5 wrote, before the package had rooms, loads: checkpoints, saved models, memory files and pickles."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers.checks import SAME_SUMS, assert_close

from memtrans import KNNMemory, KNNMemoryList, MemorizingTransformer
from memtrans.__main__ import main
from memtrans.xl_memories import XLMemories

pytestmark = pytest.mark.cpu
SAVED = Path(__file__).parents[1] / "fixtures" / "before_rooms"
EXPECTED = json.loads((SAVED / "expected.json").read_text())
MODELS = {
    "pretrained": lambda: MemorizingTransformer.from_pretrained(SAVED / "model"),
    "pickle": lambda: torch.load(SAVED / "model.pt", weights_only=False),
}
MEMORIES = {
    "file": lambda: KNNMemoryList.load(SAVED / "memories.safetensors"),
    "pickle": lambda: pickle.loads((SAVED / "memories.pickle").read_bytes()),
}


@pytest.mark.parametrize("memories", MEMORIES)
@pytest.mark.parametrize("model", MODELS)
def test_a_saved_model_goes_on_with_saved_memories(model: str, memories: str) -> None:
    loaded: KNNMemoryList = MEMORIES[memories]()
    assert loaded[0].lengths.tolist() == EXPECTED["lengths"]
    xl_memories: XLMemories = pickle.loads((SAVED / "xl_memories.pickle").read_bytes())
    tokens = torch.arange(20).reshape(2, 10)[:, 5:] % 16
    with torch.no_grad():
        logits, _ = MODELS[model]().eval()(tokens, knn_memories=loaded, xl_memories=xl_memories, add_knn_memory=False)
    assert_close(logits, torch.tensor(EXPECTED["logits"]), SAME_SUMS)


def test_a_saved_memory_loads() -> None:
    assert KNNMemory.load(SAVED / "memory.safetensors").lengths.tolist() == EXPECTED["lengths"]


def test_a_run_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(SAVED / "run", tmp_path / "run")
    arguments = ["memtrans", "train", "--out", str(tmp_path / "run"), "--resume", "--steps", "3", "--plain"]
    monkeypatch.setattr("sys.argv", arguments)
    assert main() == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 3
