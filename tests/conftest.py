"""Tests make their tensors on one device, so that the same specification holds on the CPU and on a GPU."""

from __future__ import annotations

import torch
from devices import DEVICE

torch.set_default_device(DEVICE)
