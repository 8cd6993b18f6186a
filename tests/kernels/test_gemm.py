import pytest
import torch
from torch.testing import assert_close

from heads import seeded
from protoseg.kernels import gemm


@pytest.mark.parametrize(("onednn", "level"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pixels", [0, 1, 37])
def test_the_two_products_are_products_with_every_library(pixels, dtype, onednn, level, monkeypatch):
    monkeypatch.setattr(gemm, "mkl_is_level", lambda: level)
    if not onednn:
        monkeypatch.setattr(gemm, "has_onednn", lambda: False)
    g = seeded(0)
    prototypes = torch.randn(30, 8, generator=g, dtype=torch.float64)
    embedding = torch.randn(pixels, 8, generator=g, dtype=torch.float64)
    weights = torch.randn(30, pixels, generator=g, dtype=torch.float64)
    out = torch.empty(pixels, 8, dtype=dtype)
    p = prototypes.to(dtype)
    gemm.weighted_prototypes(weights.to(dtype), p, p.T.contiguous(), out)
    tight = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-13}
    assert_close(out.double(), weights.T @ prototypes, **tight)
    assert_close(gemm.similarities(p, embedding.to(dtype)).double(), prototypes @ embedding.T, **tight)


@pytest.mark.parametrize(("vectors", "level"), [("AVX512", False), ("AVX2", True)])
def test_mkl_takes_the_second_product_but_where_onednn_has_wider_vectors(vectors, level, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert gemm.mkl_is_level.__wrapped__() is level


def test_a_build_without_onednn_falls_back(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert gemm.has_onednn.__wrapped__() is False
