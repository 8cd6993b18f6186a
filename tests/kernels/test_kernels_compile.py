"""The Triton kernels compiled for a Hopper GPU that need not be here: the interpreter takes what a compiler refuses."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter leaves nothing to compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from protoseg.kernels.class_errors import Band  # noqa: E402
from protoseg.kernels.clustering_cpu import RULES  # noqa: E402
from protoseg.kernels.gpu import cross_entropy, labels, memory, rows, segments, similarity  # noqa: E402

SIZES = [(10, 256, torch.float32), (20, 720, torch.float32), (1, 6, torch.float64)]  # K, D
HOPPER = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024  # bytes that one program may have there
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.int16: "*i16",
    torch.int32: "*i32",
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
    errors = "_error_weights" if way == "mm" else "_error_sums"
    found = [compiled(monkeypatch, similarity, name) for name in ("_nearest", "_weights", errors)]
    compiled(monkeypatch, similarity, "_merged")
    n, classes = 512, 19
    x, p = torch.zeros(n, d), torch.zeros(classes, k, d)
    owner = torch.zeros(n, dtype=torch.int64)
    cosines = similarity.Cosines(way, x, p, owner, owner, 0.1, siblings=way != "mm")
    best, seen = cosines.nearest(0, n)
    cosines.errors(Band(best, owner, x.new_zeros(classes * k, d), x.new_zeros(n)), seen, 0, n)
    cosines.push(cosines.log_sum[0], 0.01)
    cosines.gradient(best, seen, 0, n, x)
    for (kernel,) in found:
        assert kernel.metadata.shared <= SHARED
        assert ("wgmma.mma_async" in kernel.asm["ptx"]) == (way != "mm")  # the tensor cores of that GPU
        assert "atom." not in kernel.asm["ptx"]


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_what_the_tests_ask_of_a_gpu_compiles_too(monkeypatch):
    """float64, two words of ties, nothing that divides by 16."""
    names = ("_nearest", "_merged", "_weights", "_error_weights")
    found = [compiled(monkeypatch, similarity, name) for name in names]
    x, p = torch.zeros(37, 18, dtype=torch.float64), torch.zeros(20, 33, 18, dtype=torch.float64)
    owner = torch.zeros(37, dtype=torch.int64)
    cosines = similarity.Cosines("mm", x, p, owner, owner, 0.1, siblings=False)
    best, seen = cosines.nearest(3, 37)
    cosines.errors(Band(best, owner[3:], x.new_zeros(20 * 33, 18), x.new_zeros(34)), seen, 3, 37)
    cosines.push(cosines.log_sum[0], 0.01)
    cosines.gradient(best, seen, 3, 37, x[3:])
    for (kernel,) in found:
        assert kernel.metadata.shared <= SHARED
    for (kernel,) in found[:-1]:  # the last computes nothing
        assert ".f64" in kernel.asm["ptx"]


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_rows_compile_for_hopper(monkeypatch):
    found = [compiled(monkeypatch, rows, name) for name in ("_unit", "_finish", "_given", "_totals")]
    found.append(compiled(monkeypatch, labels, "_labelled"))
    x, none, target = torch.zeros(64, 720), torch.zeros(()), torch.zeros(64, dtype=torch.int64)
    rows.unit(x, x, x.bfloat16())
    rows.finish(x, x, x, x, target, x[:, 0].contiguous(), (none, 0.1), (none, 0.01))
    _, parts = rows.given(x[:, :10], x[:, 0].contiguous(), target, 0.1)
    rows.totals(x.flatten(), parts, none, none, 0.01, 0.01)
    labels.labelled(target, torch.zeros(2, 32, 32, dtype=torch.int64), 19, 255, None, torch.float32)
    for (kernel,) in found:
        assert kernel.metadata.shared <= SHARED
        assert "atom." not in kernel.asm["ptx"]


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("k", "d", "dtype"), SIZES)
def test_segments_compile_for_hopper(k, d, dtype, monkeypatch):
    names = ("_round", "_choose", "_class_masses", "_row_sums", "_segment_sums")
    found = [compiled(monkeypatch, segments, name) for name in names]
    own, target = torch.zeros(k, 64, dtype=dtype).T, torch.zeros(64, dtype=torch.int64)
    for total in (None, lambda table: table):  # the first takes factors from runs, the second from a table
        segments.balanced_index(own, target, 19, 0.05, 2, k, total is None, total)
    for weights in (None, torch.zeros(64, dtype=dtype)):
        segments.segment_sums(torch.zeros(64, d, dtype=dtype), target, 190, weights)
    assert [len(kernels) for kernels in found] == [4, 2, 2, 2, 2]
    for kernel in (kernel for kernels in found for kernel in kernels):
        assert kernel.metadata.shared <= SHARED
        assert "atom." not in kernel.asm["ptx"]


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("k", "d", "dtype"), SIZES)
def test_the_steps_of_the_memory_compile_for_hopper(k, d, dtype, rule, monkeypatch):
    names = ("_momentum", "_usage", "_worst_served", "_reseed")
    found = [compiled(monkeypatch, memory, name) for name in names]
    monkeypatch.setattr(segments, "row_sums", lambda rows, grouped: rows)
    held = [torch.zeros(19, k, d, dtype=dtype)] + [torch.zeros(19, k, dtype=dtype) for _ in range(4)]
    x, verdict = torch.zeros(64, d, dtype=dtype), torch.zeros((), dtype=dtype)
    moving = torch.zeros(64, dtype=torch.int64)
    counts = memory.move_(*held[:3], x, moving, verdict, 0.999, rule, 1000.0)
    memory.momentum_step_(*held[:3], held[0].flatten(0, 1), counts, verdict, 0.999, rule, 1000.0)
    memory.usage_step_(*held[3:], counts.view(19, k), verdict, 0.99, 0.1 / k)
    memory.reseed_(*held, x, moving, verdict, 100)
    assert [len(kernels) for kernels in found] == [2, 1, 1, 1]
    for kernel in (kernel for kernels in found for kernel in kernels):
        assert kernel.metadata.shared <= SHARED
        assert ".f32.atom" not in kernel.asm["ptx"]  # a minimum of whole numbers alone does not mind who comes first


def spilled(kernel, folder):
    """Bytes of a thread's registers that went to memory."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    asked = [tools / "cuobjdump", "-res-usage", folder / "kernel.cubin"]
    usage = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    return int(usage.split("STACK:")[1].split()[0]) + int(usage.split("LOCAL:")[1].split()[0])


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("classes", "side", "label_side", "dtype"),
    [
        (150, 128, 512, torch.float32),
        (19, 128, 512, torch.float32),
        (3, 13, 37, torch.float64),
        (1, 1, 4, torch.float64),  # a number that is 1 is compiled in
        (2, 5, 1, torch.float64),
    ],
)
@pytest.mark.parametrize(("weighted", "scaled"), [(False, True), (True, True), (False, False)])
def test_the_cross_entropy_compiles_for_hopper_and_spills_nothing(
    classes, side, label_side, dtype, weighted, scaled, monkeypatch, tmp_path
):
    found = [compiled(monkeypatch, cross_entropy, n) for n in ("_same_size", "_label_log_sums", "_label_gradient")]
    scores, share = torch.zeros(classes, side * side, dtype=dtype), torch.zeros((), dtype=dtype)
    weights = torch.ones(classes, dtype=dtype) if weighted else None
    scale = share if scaled else None
    labels = torch.zeros(1, label_side, label_side, dtype=torch.int64)
    cross_entropy.cross_entropy_(scores, labels.flatten()[: side * side], 255, weights, share, scale)
    cross_entropy.label_cross_entropy(scores, (side, side), labels, False, 255, weights, share, scale)
    for (kernel,) in found:
        assert kernel.metadata.shared <= SHARED
        assert "atom." not in kernel.asm["ptx"]
        assert spilled(kernel, tmp_path) == 0
    _, (forward,), (backward,) = found
    if dtype == torch.float32:  # neither exchanges anything between threads but at a program's ends
        assert forward.asm["ptx"].count("bar.sync") <= 1
        assert backward.asm["ptx"].count("bar.sync") <= 3 + 2 * scaled
