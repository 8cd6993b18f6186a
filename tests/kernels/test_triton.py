"""The Triton kernels through Triton's interpreter: it must be asked for before Triton is imported, hence a process."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from heads import batch, build
from protoseg.kernels import gpu

HERE = Path(__file__).parent
OLD_INTERPRETER = "ignore:Conversion of an array with ndim > 0:DeprecationWarning"  # Triton 3.6 with NumPy before 2.4


def test_the_kernels_agree_with_the_plain_lines_in_the_interpreter():
    pytest.importorskip("triton")
    files = sorted(str(path) for path in HERE.glob("test_triton_*.py"))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", OLD_INTERPRETER, *files]
    run = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", gpu.VARIABLE: "auto"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "only 0-dimensional arrays can be converted" in run.stdout:
        pytest.skip("this Triton's interpreter does not know this NumPy (Triton 3.6 with NumPy 2.4 and later)")
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout, run.stdout[-2000:]


@pytest.fixture
def unasked(monkeypatch):
    """As if nobody had asked before whether the kernels are at hand."""
    monkeypatch.delenv(gpu.VARIABLE, raising=False)
    forget = gpu.at_hand.cache_clear
    forget()
    yield
    forget()


CUDA = torch.device("cuda", 0)


def test_tensors_on_the_cpu_take_the_plain_lines(unasked, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(gpu, "at_hand", lambda device: True)
    assert gpu.way(torch.device("cpu"), torch.float32) is None
    assert gpu.way(CUDA, torch.float32) is not None
    assert gpu.way(CUDA, torch.float16) is None


def test_a_machine_without_triton_says_so_in_the_log_alone(unasked, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "protoseg.kernels.gpu.rows", raising=False)
    with caplog.at_level(logging.INFO, "protoseg.kernels.gpu"):
        assert gpu.way(CUDA, torch.float32) is None
    assert "no Triton kernels" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_kernel_that_cannot_be_launched_leaves_the_plain_lines(unasked):
    pytest.importorskip("triton")
    assert gpu.way(CUDA, torch.float32) is None


@pytest.mark.parametrize(
    ("asked", "given"), [("off", None), ("bf16", "bf16"), ("tf32", "tf32"), ("mm", "mm"), ("auto", "mm")]
)
def test_the_variable_names_a_way_or_none(asked, given, monkeypatch):
    monkeypatch.setattr(gpu, "at_hand", lambda device: True)
    monkeypatch.setenv(gpu.VARIABLE, asked)
    assert gpu.way(CUDA, torch.float32) == given
    assert gpu.way(CUDA, torch.float32, half=True) == ("bf16" if asked == "auto" else given)
    assert gpu.way(CUDA, torch.float64) == (None if asked == "off" else "mm")


@pytest.mark.parametrize("allowed", ["ieee", "tf32"])
def test_products_of_full_precision_are_left_to_pytorch_in_tf32_as_well(allowed, unasked, monkeypatch):
    monkeypatch.setattr(gpu, "at_hand", lambda device: True)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = allowed
    try:
        assert gpu.way(CUDA, torch.float32) == "mm"
        assert gpu.way(CUDA, torch.float32, half=True) == "bf16"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_an_unknown_way_is_refused(monkeypatch):
    monkeypatch.setenv(gpu.VARIABLE, "fast")
    with pytest.raises(ValueError, match="PROTOSEG_TRITON must be one of auto, off"):
        build(6, 3).losses(*batch(6, 3))
