"""What the extras install is asked for when it is used, and named where it is missing."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_runs import TINY, written_text

from memtrans import MemorizingTransformer, generate

pytestmark = pytest.mark.cpu

# Nothing that is installed here but torch (with what it needs itself), numpy and safetensors.
WITHOUT_EXTRAS = "import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n{then}"
BLOCKED = ("einops", "matplotlib", "tqdm", "huggingface_hub", "transformers", "triton", "faiss", "pandas", "scipy")


def ended(then: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process without what the extras install."""
    code = WITHOUT_EXTRAS.format(blocked=BLOCKED, then=then)
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_a_layer_needs_no_extra() -> None:
    then = """
import torch, memtrans
attention = memtrans.KNNAttention(dim=16, heads=2, dim_head=8)
memory = memtrans.KNNMemory(dim=8, max_memories=16)
print(attention(torch.randn(1, 4, 16), knn_memory=memory)[0].shape)
"""
    done = ended(then)
    assert (done.returncode, done.stdout) == (0, "torch.Size([1, 4, 16])\n"), done.stderr


def test_train_and_generate_need_no_extra_and_one_line_names_it_in_place_of_the_picture(tmp_path: Path) -> None:
    main = (
        "import sys; from memtrans.cli.main import main; sys.stderr.isatty = lambda: True; sys.exit(main(sys.argv[1:]))"
    )
    options = [option for option in TINY if option != "--plain"]
    out = tmp_path / "run"
    command = ["train", "--data", written_text(tmp_path), "--out", str(out), "--steps", "2", "--log-every", "1"]
    done = ended(main, *command, *options)
    assert done.returncode == 0, done.stderr
    *lines, summary = done.stdout.splitlines()
    assert json.loads(summary)["steps"] == 2
    named = [line for line in lines if "memtrans[train]" in line]
    assert len(named) == 1 and named[0].startswith("no loss.png, which needs Matplotlib: pip install 'memtrans[train]'")
    assert [line for line in lines if line.startswith("step 1/2: ")]
    assert not (out / "loss.png").exists()
    done = ended(main, "generate", "--checkpoint", str(out), "--tokens", "2")
    assert done.returncode == 0, done.stderr


def test_a_progress_bar_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    model = MemorizingTransformer(num_tokens=16, dim=16, depth=2, dim_head=8, heads=2, memorizing_layers=2)
    with pytest.raises(ImportError, match=r"pip install 'memtrans\[train\]'"):
        generate(model, [1, 2], tokens=2, progress=True)
    assert generate(model, [1, 2], tokens=2).shape == (1, 2)


def test_22_9_push_to_hub_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = MemorizingTransformer(num_tokens=16, dim=16, depth=2, dim_head=8, heads=2, memorizing_layers=2)
    with pytest.raises(ImportError, match=r"push_to_hub needs huggingface_hub: pip install 'memtrans\[hub\]'"):
        model.push_to_hub("user/name")


class HubOfTheTest:
    """In the place of `huggingface_hub.HfApi`."""

    uploaded: dict[str, Any]

    def __init__(self, token: str | None = None) -> None:
        type(self).uploaded = {"token": token}

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
        self.uploaded.update(repo=repo_id, private=private, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
        self.uploaded.update(files=sorted(path.name for path in Path(folder_path).iterdir()), message=commit_message)
        return f"https://huggingface.co/{repo_id}/commit/1"


def test_22_9_push_to_hub_uploads_what_save_pretrained_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = types.ModuleType("huggingface_hub")
    hub.HfApi = HubOfTheTest  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    model = MemorizingTransformer(num_tokens=16, dim=16, depth=2, dim_head=8, heads=2, memorizing_layers=2)
    memories = model.create_knn_memories(batch_size=1, device="cpu")
    address = model.push_to_hub("user/name", memories, private=True, token="secret", commit_message="first")
    assert address == "https://huggingface.co/user/name/commit/1"
    assert HubOfTheTest.uploaded == {
        "token": "secret", "repo": "user/name", "private": True, "exist_ok": True, "message": "first",
        "files": ["README.md", "config.json", "memories.safetensors", "model.safetensors"],
    }  # fmt: skip
