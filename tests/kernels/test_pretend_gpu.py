"""A step on tensors that only say they are on a GPU: no device is mixed with another and no value is read back.

They have shapes, types and devices but no memory, so every line of the CUDA branches runs here but the kernels
themselves, which are launched into nothing. Reading a value, or a shape that depends on values, is an error."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from protoseg.config import Head, Model
from protoseg.data import augment
from protoseg.engine.module import zero_unless_
from protoseg.kernels import gpu
from protoseg.method.head import PrototypeHead
from protoseg.method.losses import Errors, Losses
from protoseg.models import build

pytest.importorskip("triton")
from protoseg.kernels.gpu import cross_entropy, labels, memory, rows, segments, similarity

CUDA = torch.device("cuda", 0)
KERNELS = {
    labels: ("_labelled",),
    rows: ("_unit", "_finish", "_given", "_totals"),
    segments: ("_round", "_choose", "_class_masses", "_row_sums", "_segment_sums"),
    memory: ("_momentum", "_usage", "_worst_served", "_reseed"),
    similarity: ("_nearest", "_merged", "_weights", "_error_weights", "_error_sums"),
    cross_entropy: ("_same_size", "_label_log_sums", "_label_gradient"),
}
VARIANTS = {
    "default": {},
    "paper": {"preset": "paper"},
    "reference": {"preset": "reference"},
    "reference_fixed": {"preset": "reference_fixed"},
    "no siblings": {"contrast_siblings": False},
    "drawn negatives": {"contrast_negatives": 12},
    "kmeans": {"assignment": "kmeans"},
    "count aware": {"momentum_rule": "count_aware", "start": "data", "update_from": "correct"},
    "class weights": {"class_weights": [0.5] * 30},
    "euclidean": {"distance": "euclidean"},
}


class Seen(TorchDispatchMode):
    """Names of the operations, those that gave something on the CPU, and how many there were but views.

    Only a tensor that pretends is asked for its device by a call, so that is no operation.
    """

    def __init__(self):
        super().__init__()
        self.names, self.elsewhere, self.calls = set(), set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        self.calls += not (func.is_view or str(func) in ("prim.device.default", "aten.promote_types.default"))
        given = out if isinstance(out, tuple | list) else [out]
        if any(isinstance(t, torch.Tensor) and t.device != CUDA for t in given):
            self.elsewhere.add(str(func))
        return out


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that were launched, into nothing."""
    found = []

    class Launcher:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            assert all(0 < side < (2**31, 2**16, 2**16)[i] for i, side in enumerate(grid))
            return lambda *values, **named: found.append(self.name)

    for module, names in KERNELS.items():
        monkeypatch.setattr(module, "launching_on", lambda tensor: nullcontext())
        for name in names:
            monkeypatch.setattr(module, name, Launcher(name))
    monkeypatch.setattr(gpu, "at_hand", lambda device: True)
    yield found
    forget()


def forget():
    """No tensor that pretends is left for those that do not, or for another that does."""
    for cache in (cross_entropy._resize, gpu.constant, segments._edges):
        cache.cache_clear()


@contextmanager
def pretending():
    forget()
    with FakeTensorMode(allow_non_fake_inputs=False), Seen() as seen:
        yield seen
    assert seen.elsewhere == set()


def head_there(*args, change=lambda head: None, **named):
    """Made outside, as a start may look at values, and changed there; to be called inside."""
    head = PrototypeHead(*args, **named)
    change(head)

    return lambda: moved(head)


def moved(root):
    """All that a module holds, there; to be called inside."""
    for module in root.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None:
                    there = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
                    held[name] = nn.Parameter(there) if isinstance(value, nn.Parameter) else there
    return root


def step(head, side=32, up=4, dtype=torch.float32):
    features = torch.empty(2, 16, side, side, dtype=dtype, device=CUDA, requires_grad=True)
    labels = torch.empty(2, side * up, side * up, dtype=torch.int64, device=CUDA)
    losses = head.losses(features, labels)  # makes the gradients as well
    head.update(losses)
    with torch.no_grad():
        head(features)
    return losses


@pytest.mark.parametrize("way", ["off", "mm", "bf16", "tf32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_stays_on_its_device_and_reads_nothing_back(way, variant, launches, monkeypatch):
    monkeypatch.setenv(gpu.VARIABLE, way)
    made = head_there(16, 30, embed_dim=24, **VARIANTS[variant])
    for up in (1, 4):
        with pretending():
            assert step(made(), up=up).assignment.device == CUDA
    assert bool(launches) == (way != "off")


@pytest.mark.parametrize(
    ("dtype", "whole", "way"),
    [
        (torch.float32, False, "mm"),
        (torch.bfloat16, False, "bf16"),
        (torch.float16, False, "bf16"),
        (torch.bfloat16, True, "bf16"),
    ],
)
def test_features_decide_how_products_are_taken(dtype, whole, way, launches, monkeypatch):
    """Of a head whose projection alone, or which as a whole, has their type."""
    monkeypatch.delenv(gpu.VARIABLE, raising=False)
    found = []

    class Noted(similarity.Cosines):
        def __init__(self, way, *known):
            found.append(way)
            super().__init__(way, *known)

    monkeypatch.setattr(similarity, "Cosines", Noted)

    made = head_there(16, 30, embed_dim=24, change=lambda head: (head if whole else head.projection).to(dtype))
    with pretending():
        losses = step(made(), dtype=dtype)
    assert found == [way, way]  # the losses, then the scores alone
    assert losses.total.dtype == torch.float32


def test_reading_a_value_would_be_seen():
    with pytest.raises(DataDependentOutputException), pretending():
        bool(torch.empty((), device=CUDA) > 0)


@pytest.mark.parametrize("way", ["off", "mm"])
def test_among_deterministic_algorithms_labels_are_not_sorted(way, launches, monkeypatch):
    """There `scatter_add_` sorts all label pixels on a GPU, as `index_put_` does."""
    monkeypatch.setenv(gpu.VARIABLE, way)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    made = head_there(16, 30, embed_dim=24)
    with pretending() as seen:
        step(made())
    assert not [name for name in seen.names if name.startswith(("aten.scatter_add", "aten.index_put"))]


@pytest.mark.parametrize("way", ["off", "mm"])
def test_no_sum_of_a_default_step_is_atomic(way, launches, monkeypatch):
    """Atomic additions come in another order every time; what `scatter_add_` adds here goes to places of its own."""
    monkeypatch.setenv(gpu.VARIABLE, way)
    made = head_there(16, 30, embed_dim=24)
    for up in (1, 4):
        with pretending() as seen:
            step(made(), up=up)
        atomic = ("index_add", "index_put", "_unsafe_index", "index_reduce", "embedding_dense_backward", "upsample")
        assert not [name for name in seen.names if name.removeprefix("aten.").startswith(atomic)]


@pytest.mark.parametrize(
    ("way", "preset", "most", "kernels"), [("off", "paper", 175, 0), ("mm", "paper", 22, 9), ("mm", "default", 24, 10)]
)
def test_clustering_and_update_take_as_many_operations_for_any_number_of_classes(
    way, preset, most, kernels, launches, monkeypatch
):
    """Beside the launches of Triton's kernels; without them it is far from the 30 aimed at."""
    monkeypatch.setenv(gpu.VARIABLE, way)
    counts = []
    for classes in (2, 150, 847):
        made = head_there(16, classes, projection="none", preset=preset, ignore_index=-1)
        launches.clear()
        with pretending() as seen, torch.no_grad():
            head, embedding, total = made(), torch.empty(4096, 16, device=CUDA), torch.empty((), device=CUDA)
            wrong = Errors(torch.empty(10 * classes, 16, device=CUDA), torch.empty(4096, device=CUDA))
            own, classes = torch.empty(4096, 10, device=CUDA), torch.empty(4096, dtype=torch.int64, device=CUDA)
            before = seen.calls
            given, moving = head._assign(own, None, classes, None, embedding)
            head.update(Losses(total, total, total, total, given, embedding, moving, {}, wrong))
            counts.append(seen.calls - before)
        assert len(launches) == kernels
    assert counts[0] == counts[1] == counts[2] <= most


@pytest.mark.parametrize(
    ("preset", "up", "operations", "kernels"),
    [("paper", 1, 40, 13), ("paper", 4, 44, 14), ("default", 1, 51, 14), ("default", 4, 55, 15)],
)
def test_the_losses_of_one_band_take_as_many_launches_at_label_size_as_at_feature_size(
    preset, up, operations, kernels, launches, monkeypatch
):
    """But one, and two to bring labels to feature size; half of them only allocate. By strips there were 249."""
    monkeypatch.setenv(gpu.VARIABLE, "mm")
    made = head_there(16, 19, projection="none", preset=preset)
    with pretending() as seen:
        head = made()
        labels = torch.empty(8, 128 * up, 128 * up, dtype=torch.int64, device=CUDA)
        features = torch.empty(8, 16, 128, 128, device=CUDA, requires_grad=True)
        for _ in range(2):  # the first time makes tables that stay
            launches.clear()
            before = seen.calls
            head.losses(features, labels)
    assert seen.calls - before <= operations
    assert len(launches) == kernels


@pytest.mark.parametrize("kind", ["prototype", "softmax", "cosine"])
@pytest.mark.parametrize("ordered", [True, False])
def test_a_network_among_deterministic_algorithms_resizes_without_a_sort(kind, ordered, launches, monkeypatch):
    """There `F.interpolate` is four gathers, and its gradient sorts every number of a map by its place."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: ordered)
    network = build(Model(network="tiny"), Head(kind=kind, embed_dim=24), 5)
    with FakeTensorMode(allow_non_fake_inputs=True), Seen() as seen:
        there = moved(network)
        images = torch.empty(2, 3, 64, 96, dtype=torch.uint8, device=CUDA)
        losses = there.losses(images, torch.empty(2, 64, 96, dtype=torch.int64, device=CUDA))
        names = backward_names(losses.total)
    assert "aten._unsafe_index.Tensor" not in seen.names
    assert ("UpsampleBilinear2DBackward0" in names) == (not ordered)
    assert ("_BilinearBackward" in names) == ordered


def backward_names(loss):
    """Names of all steps of the way back, which cannot be gone where nothing but the tensors pretends."""
    todo, known = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in known:
            known.add(node)
            todo += [following for following, _ in node.next_functions]
    return {node.name() for node in known}


def test_batches_are_cut_on_their_device():
    with pretending() as seen:
        images = torch.empty(5000, 3, dtype=torch.uint8, device=CUDA)
        labels = torch.empty(5000, dtype=torch.uint8, device=CUDA)
        samples = torch.empty(4, augment.FIELDS, dtype=torch.float64, device=CUDA)
        image, label = augment.cut_batch(images, labels, samples, crop_size=(16, 24), reach=(20, 30), ignore_index=255)
    assert image.shape == (4, 3, 16, 24)
    assert label.dtype == torch.int64
    assert "aten.nonzero.default" not in seen.names


def test_gradients_are_judged_on_their_device():
    with pretending():
        gradients = [torch.empty(3, 4, device=CUDA), torch.empty(5, dtype=torch.bfloat16, device=CUDA)]
        zero_unless_(torch.nn.utils.get_total_norm(gradients[:1]).isfinite(), gradients)
