"""What small runs read."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def text(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        content = torch.randint(97, 103, (90 + 37 * number,), generator=generator, dtype=torch.uint8)
        (tmp_path / f"{number}.txt").write_bytes(bytes(content.tolist()))
    return str(tmp_path)
