"""The Triton kernels compiled for a Hopper GPU that need not be here: the interpreter takes what a compiler refuses."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter leaves nothing to compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from protoseg.kernels.gpu import rows, segments, similarity  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024  # bytes that one program may have there
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.int16: "*i16",
    torch.int64: "*i64",
}


class Compiled:
    """Stands for a kernel: a launch compiles it for what it was launched with, and keeps the result."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.results = []

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *values, **named):
        options = {name: named.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in named}
        given = dict(zip(self.kernel.arg_names, values)) | named
        assert list(given) == self.kernel.arg_names or set(given) == set(self.kernel.arg_names)
        signature, constants, hints = {}, {}, {}
        for place, parameter in enumerate(self.kernel.params):
            value = given[parameter.name]
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                signature[parameter.name], constants[(place,)] = "constexpr", value
                continue
            tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = POINTERS[value.dtype] if tensor else "i32"
            if tensor or value % 16 == 0:
                hints[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, hints)
        self.results.append(triton.compile(source, target=HOPPER, options=options))


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(monkeypatch, module, name):
    stand_in = Compiled(getattr(module, name))
    monkeypatch.setattr(module, name, stand_in)
    return stand_in.results


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("way", "k", "d"), [("mm", 20, 256), ("bf16", 10, 256), ("tf32", 10, 720)])
def test_the_one_pass_compiles_for_hopper_and_fits_it(way, k, d, monkeypatch):
    found = compiled(monkeypatch, similarity, "_nearest"), compiled(monkeypatch, similarity, "_weights")
    compiled(monkeypatch, similarity, "_merged")
    n, classes = 512, 19
    x, p = torch.zeros(n, d), torch.zeros(classes, k, d)
    owner = torch.zeros(n, dtype=torch.int64)
    cosines = similarity.Cosines(way, x, p, owner, owner, 0.1, siblings=way != "mm")
    best, seen = cosines.nearest(0, n)
    cosines.gradient(best, seen, cosines.log_sum, 0, n, x)
    for (kernel,) in found:
        assert kernel.metadata.shared <= SHARED
        assert ("wgmma.mma_async" in kernel.asm["ptx"]) == (way != "mm")  # the tensor cores of that GPU
        assert "atom." not in kernel.asm["ptx"]


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_what_the_tests_ask_of_a_gpu_compiles_too(monkeypatch):
    """float64, two words of ties, nothing that divides by 16."""
    names = ("_nearest", "_merged", "_weights")
    found = [compiled(monkeypatch, similarity, name) for name in names]
    x, p = torch.zeros(37, 18, dtype=torch.float64), torch.zeros(20, 33, 18, dtype=torch.float64)
    owner = torch.zeros(37, dtype=torch.int64)
    cosines = similarity.Cosines("mm", x, p, owner, owner, 0.1, siblings=False)
    best, seen = cosines.nearest(3, 37)
    cosines.gradient(best, seen, cosines.log_sum[3:], 3, 37, x[3:])
    for (kernel,) in found:
        assert kernel.metadata.shared <= SHARED
        assert ".f64" in kernel.asm["ptx"]


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_rows_and_segments_compile_for_hopper(monkeypatch):
    found = [
        compiled(monkeypatch, module, name)
        for module, name in [(rows, "_unit"), (rows, "_finish"), (segments, "_round"), (segments, "_row_sums")]
    ]
    x, none, target = torch.zeros(64, 720), torch.zeros(()), torch.zeros(64, dtype=torch.int64)
    rows.unit(x, x, x.bfloat16())
    rows.finish(x, x, x, x, target, x[:, 0].contiguous(), none, none)
    segments.masses(torch.zeros(64, 10), segments.grouped(target, 19), torch.ones(19, 10), 0.05)
    segments.segment_sums(x, target, 190)
    for (kernel,) in found:
        assert kernel.metadata.shared <= SHARED
        assert "atom." not in kernel.asm["ptx"]
