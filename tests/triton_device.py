"""Where the Triton kernels are tested: on a GPU where there is one, else on the CPU under TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
at_hand = pytest.mark.skipif(
    not (INTERPRETED or DEVICE == "cuda"), reason="no GPU, and without TRITON_INTERPRET=1 Triton runs on nothing else"
)
