from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from heads import seeded
from protoseg.kernels.class_errors import Band, add
from protoseg.method.similarity import unit
from triton_device import DEVICE, INTERPRETED, at_hand

similarity = pytest.importorskip("protoseg.kernels.gpu.similarity", reason="no Triton")
rows = pytest.importorskip("protoseg.kernels.gpu.rows", reason="no Triton")
pytestmark = at_hand

TAU = 0.1
FACTOR = 0.7
# Of a cosine and, relative to its norm, of the gradient. Inputs of tf32 and bf16 fit these types already, so what is
# rounded is a prototype's weight in the gradient. (The interpreter has no tf32 and multiplies in fp32.)
TOLERANCES = {
    ("mm", torch.float64): (1e-14, 1e-13),
    ("mm", torch.float32): (1e-6, 1e-5),
    ("ieee", torch.float64): (1e-14, 1e-13),
    ("ieee", torch.float32): (1e-6, 1e-5),
    ("tf32", torch.float32): (1e-6, 2e-3),
    ("bf16", torch.float32): (1e-6, 8e-3),
}
KINDS = [kind for kind in TOLERANCES if INTERPRETED or kind != ("ieee", torch.float64)]


class Problem:
    """Unit rows and prototypes, classes, targets, and a gradient to class maxima and log-sum-exp."""

    def __init__(self, n, classes, k, d, dtype, *, way="mm", tied=False, void=0.1, start=3):
        g = seeded(n + classes + k + d)
        x = F.normalize(torch.randn(n, d, generator=g, dtype=torch.float64))
        p = F.normalize(torch.randn(classes, k, d, generator=g, dtype=torch.float64), dim=2)
        if tied:
            p[:, k // 2 :] = p[:, :1]
        if way == "bf16":
            x, p = x.bfloat16(), p.bfloat16()
        if way == "tf32":  # fp16 has no more digits
            x, p = x.half(), p.half()
        self.x, self.p = x.to(DEVICE, dtype), p.to(DEVICE, dtype)
        classes_of = torch.randint(classes, (n,), generator=g)
        self.classes = torch.where(torch.rand(n, generator=g) < void, -1, classes_of).to(DEVICE)
        given = classes_of * k + torch.randint(k, (n,), generator=g)
        self.target = torch.where(self.classes < 0, -1, given.to(DEVICE))
        self.part = slice(start, n)
        self.slope = torch.randn(classes, n - start, generator=g, dtype=torch.float64).to(DEVICE, dtype)
        self.share = torch.rand((), generator=g, dtype=torch.float64).to(DEVICE, dtype)

    def found(self, way, siblings=True):
        """(C, n) maxima, (n,) log-sum-exp, (K, n) own cosines and (n, D) gradient by the kernels."""
        target = None if siblings else self.target
        cosines = similarity.Cosines(way, self.x, self.p, self.classes, target, TAU, siblings)
        cosines.fill(None, 0, len(self.x))
        best, seen = cosines.nearest(self.part.start, self.part.stop)
        gradient = torch.full_like(self.x[self.part], torch.nan)
        cosines.push(self.share, FACTOR)
        cosines.gradient(self.slope, seen, self.part.start, self.part.stop, gradient)
        return best, cosines.log_sum[self.part], cosines.own[:, self.part], gradient

    def true(self, siblings=True):
        """The same from one table in float64."""
        classes, k = self.p.shape[:2]
        x = self.x[self.part].double().requires_grad_(True)
        table = x @ self.p.double().flatten(0, 1).T
        best = table.unflatten(1, (classes, k)).amax(2)
        owner = self.classes[self.part].clamp(min=0)[:, None]
        logits = table / TAU
        if not siblings:
            rivals = (torch.arange(classes * k, device=DEVICE) // k)[None] == owner
            rivals.scatter_(1, self.target[self.part].clamp(min=0)[:, None], False)
            logits = logits.masked_fill(rivals, -torch.inf)
        log_sum = logits.logsumexp(1)
        pushed = torch.where(self.classes[self.part] >= 0, log_sum, 0).sum() * self.share.double() * FACTOR
        ((best.T * self.slope).sum() + pushed).backward()
        own = table.unflatten(1, (classes, k)).gather(1, owner[:, None].expand(-1, 1, k))[:, 0]
        return best.T.detach(), log_sum.detach(), own.T.detach(), x.grad

    def clear(self, margin):
        """(n, 1) whether every class's two best are `margin` apart: a nearer tie may fall either way."""
        classes, k = self.p.shape[:2]
        if k == 1:
            return torch.ones(self.part.stop - self.part.start, 1, dtype=torch.bool, device=DEVICE)
        table = self.x[self.part].double() @ self.p.double().flatten(0, 1).T
        best = table.unflatten(1, (classes, k)).topk(2, 2).values
        return (best[..., 0] - best[..., 1] > margin).all(1, keepdim=True)

    def check(self, way, siblings=True, tied=False):
        cosine, relative = TOLERANCES[way, self.x.dtype]
        *found, gradient = self.found(way, siblings)
        *true, true_gradient = self.true(siblings)
        for one, two, scale in zip(found, true, (1, 1 / TAU, 1)):
            assert_close(one.double(), two, rtol=0, atol=4 * scale * cosine)
        clear = 1.0 if tied else self.clear(4 * cosine).double()
        assert tied or clear.mean() > 0.5
        error = ((gradient.double() - true_gradient) * clear).norm() / (true_gradient * clear).norm()
        assert error < relative


@pytest.mark.parametrize(("way", "dtype"), KINDS)
@pytest.mark.parametrize(
    ("n", "classes", "k", "d"),
    [(70, 19, 10, 20), (5, 2, 1, 16), (21, 34, 3, 130), (20, 3, 17, 24)],
    ids=["19 classes", "K=1, C=2", "wide", "two words of ties"],
)
def test_maxima_sums_own_cosines_and_gradient_are_those_of_the_table(n, classes, k, d, way, dtype):
    Problem(n, classes, k, d, dtype, way=way).check(way)


def exact_for(way):
    return torch.float64 if (INTERPRETED and way == "ieee") or way == "mm" else torch.float32


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", ["mm", "ieee", "tf32", "bf16"])
@pytest.mark.parametrize(("n", "classes", "k", "d"), [(150, 19, 10, 20), (5, 2, 1, 16), (40, 3, 33, 300)])
def test_errors_are_those_of_the_plain_lines(n, classes, k, d, way, tied, monkeypatch):
    """Of equal cosines the first is the nearest; 33 prototypes take three words of bits; pixels in several pieces."""
    monkeypatch.setattr(similarity, "ERROR_TABLE", classes * k * 7)
    p = Problem(n, classes, k, d, exact_for(way), way=way, tied=tied)
    start, end = p.part.start, p.part.stop
    cosines = similarity.Cosines(way, p.x, p.p, p.classes, None, TAU, True)
    cosines.fill(None, 0, n)
    _, seen = cosines.nearest(start, end)
    wide = p.slope.repeat(1, 2)  # rows of errors are apart, as where they are part of an image's
    found, true = (
        Band(wide[:, : end - start], p.classes[p.part], torch.ones_like(p.p.flatten(0, 1)), wide.new_zeros(end - start))
        for _ in range(2)
    )
    cosines.errors(found, seen, start, end)
    if way == "mm":
        table = seen[1]  # where rows are equal, a library's products need not be
    else:
        table = (p.p.double().flatten(0, 1) @ p.x[p.part].double().T).to(p.x)
        if tied:
            table.view(classes, k, -1)[:, k // 2 :] = table.view(classes, k, -1)[:, :1]
    add(true, table, p.x[p.part])
    assert_close(found.lacking, true.lacking, rtol=0, atol=0)
    error = (found.taken - true.taken).norm() / (true.taken - 1).norm()
    assert error < TOLERANCES[way, p.x.dtype][1]


@pytest.mark.parametrize("siblings", [True, False])
@pytest.mark.parametrize("k", [4, 16, 33])
@pytest.mark.parametrize("way", ["mm", "ieee"])
def test_exact_ties_share_the_gradient_as_amax_does(way, k, siblings):
    dtype = torch.float64 if INTERPRETED or way == "mm" else torch.float32
    Problem(21, 3, k, 18, dtype, tied=True).check(way, siblings, tied=True)


@pytest.mark.parametrize(("way", "dtype"), KINDS)
def test_without_siblings_only_the_target_stands_for_the_own_class(way, dtype):
    Problem(40, 5, 4, 20, dtype, way=way).check(way, siblings=False)


@pytest.mark.parametrize("way", ["mm", "ieee", "bf16"])
def test_a_lone_class_without_siblings_is_its_own_only_rival(way):
    Problem(20, 1, 4, 20, torch.float32, way=way).check(way, siblings=False)


@pytest.mark.parametrize("way", ["mm", "ieee", "bf16", "tf32"])
def test_channels_beyond_one_block_are_all_counted(way):
    Problem(20, 3, 2, 300, torch.float32, way=way).check(way)


@pytest.mark.parametrize("programs", [1, 3, 1000])
@pytest.mark.parametrize("way", ["mm", "ieee"])
def test_sharing_classes_out_over_programs_changes_nothing(way, programs, monkeypatch):
    usual = similarity.blocks
    monkeypatch.setattr(similarity, "blocks", lambda *a, **named: replace(usual(*a, **named), programs=programs))
    Problem(40, 70, 2, 17, torch.float64 if INTERPRETED else torch.float32).check(
        way if INTERPRETED or way == "mm" else "ieee"
    )


@pytest.mark.parametrize("way", ["mm", "bf16"])
def test_void_pixels_have_no_contrast(way):
    problem = Problem(20, 3, 4, 20, torch.float32, way=way, void=1.0)
    assert (problem.classes < 0).all()
    problem.check(way)
    problem.check(way, siblings=False)


@pytest.mark.parametrize("way", ["mm", "tf32"])
def test_no_pixel_is_no_trouble(way):
    problem = Problem(3, 3, 4, 20, torch.float32)
    best, log_sum, own, gradient = problem.found(way)
    assert best.shape == (3, 0)
    assert log_sum.shape == (0,)
    assert own.shape == (4, 0)
    assert gradient.shape == (0, 20)


@pytest.mark.parametrize(("way", "dtype"), KINDS)
def test_maxima_alone_are_the_same(way, dtype):
    problem = Problem(50, 19, 5, 20, dtype, way=way, start=0)
    best = similarity.best_of_each_class(way, problem.x, problem.p)
    assert_close(best.double(), problem.true()[0], rtol=0, atol=4 * TOLERANCES[way, dtype][0])


def test_the_maximum_is_taken_of_sums_not_of_rounded_cosines():
    # Two prototypes whose cosines differ by less than bf16 can say: the nearer one alone must get the gradient.
    x = torch.zeros(1, 32, device=DEVICE)
    x[0, :2] = torch.tensor([1.0, 2**-6])
    p = torch.zeros(1, 2, 32, device=DEVICE)
    p[0, :, 0] = 1.0
    p[0, 1, 1] = 2**-6  # its cosine is larger by 2^-12
    for way in ("bf16", "mm"):
        cosines = similarity.Cosines(way, x, p, torch.zeros(1, dtype=torch.int64, device=DEVICE), None, TAU, True)
        cosines.fill(None, 0, 1)
        best, seen = cosines.nearest(0, 1)
        assert best.item() == 1 + 2**-12
        gradient = torch.empty_like(x)
        cosines.push(torch.zeros((), device=DEVICE), 1.0)
        cosines.gradient(torch.ones_like(best), seen, 0, 1, gradient)
        assert gradient[0, 1].item() == 2**-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 700])
def test_what_pixels_were_given_and_the_total_of_all_losses(n, dtype):
    """More parts than are summed at once, and pixels that were given nothing."""
    g = seeded(n)
    own = (torch.rand(4, n, generator=g, dtype=dtype) * 2 - 1).to(DEVICE).T
    log_sum, losses = torch.randn(n, generator=g, dtype=dtype).to(DEVICE), torch.rand(5000, generator=g, dtype=dtype)
    target = torch.randint(-1, 20, (n,), generator=g).to(DEVICE)
    shares = torch.tensor([0.01, 1 / n], dtype=dtype, device=DEVICE)
    near, parts = rows.given(own, log_sum, target, TAU)
    total, ce, ppc, ppd = rows.totals(losses.to(DEVICE), parts, *shares, 0.3, 0.2)
    given = target >= 0
    true = torch.where(given, own.gather(1, (target % 4)[:, None])[:, 0], 0)
    tolerance = {"rtol": 1e-13, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    assert torch.equal(near, true)
    assert_close(ce, losses.to(DEVICE).sum() * shares[0], **tolerance)
    assert_close(ppc, (log_sum - true / TAU)[given].sum() * shares[1], **tolerance)
    assert_close(ppd, (1 - true[given]).square().sum() * shares[1], **tolerance)
    assert_close(total, ce + 0.3 * ppc + 0.2 * ppd, **tolerance)


def test_unit_rows_are_rounded_to_bf16_beside():
    raw = torch.randn(9, 40, generator=seeded(2)).to(DEVICE)
    out, half = torch.empty_like(raw), torch.empty_like(raw, dtype=torch.bfloat16)
    rows.unit(raw, out, half)
    assert_close(half.float(), out, rtol=2**-7 if INTERPRETED else 2**-8, atol=0)  # the interpreter cuts off


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize(("n", "d"), [(37, 20), (5, 720), (1, 16)])
def test_unit_length_and_its_adjoint(n, d, layout, dtype):
    g = seeded(1)
    raw = torch.randn(n, d, generator=g, dtype=dtype)
    raw[0] = 0
    raw = raw.to(DEVICE)
    if layout == "columns":
        raw = raw.T.contiguous().T
    tolerance = 1e-13 if dtype == torch.float64 else 2e-5
    out = torch.empty(n, d, dtype=dtype, device=DEVICE)
    rows.unit(raw, out)
    assert_close(out, F.normalize(raw), rtol=0, atol=tolerance)

    prototypes = F.normalize(torch.randn(6, d, generator=g, dtype=dtype)).to(DEVICE)
    target = torch.randint(-1, 6, (n,), generator=g).to(DEVICE)
    slope = torch.randn(n, d, generator=g, dtype=dtype).to(DEVICE)
    near = (out * prototypes[target.clamp(min=0)]).sum(1)
    contrast, distance = torch.tensor([0.3, 0.7], dtype=dtype, device=DEVICE)
    leaf = raw.detach().clone().requires_grad_(True)
    x = unit(leaf)
    cosine = (x * prototypes[target.clamp(min=0)]).sum(1)
    pull = torch.where(target >= 0, -contrast * cosine + distance * (1 - cosine).square(), 0).sum()
    ((x * slope).sum() + pull).backward()
    rows.finish(slope, out, raw, prototypes, target, near, (contrast / 3, 3.0), (distance / 0.5, 0.5))
    assert_close(slope, leaf.grad, rtol=0, atol=tolerance)
    assert not slope[0].any()  # without length
