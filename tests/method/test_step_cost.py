"""A step waits for no value of a device, and takes as many operations for two classes as for two hundred."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from heads import batch, build
from protoseg.kernels import clustering_cpu
from protoseg.method.head import PrototypeHead


class Watch(TorchDispatchMode):
    """Counts operations but views, and those that make a GPU wait: a value read, or a shape that depends on values."""

    def __init__(self):
        super().__init__()
        self.calls, self.waits = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += not func.is_view
        name = str(func)
        masked = name.startswith(("aten.index.", "aten.index_put")) and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        waits = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.bincount", "aten._unique")
        if masked or name.startswith((*waits, "aten.unique", "aten.equal", "aten.repeat_interleave.Tensor")):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def labels_are_not_looked_at(monkeypatch):
    monkeypatch.setattr("protoseg.method.head.check_labels", lambda *_: None)  # they are on the CPU only


def step(head, features, labels):
    features = features.clone().requires_grad_(True)
    losses = head.losses(features, labels)
    losses.total.backward()
    head.update(losses)


def test_the_watch_sees_what_makes_a_gpu_wait():
    x = torch.arange(3)
    with Watch() as watch:
        x[x > 1].sum().item()
    assert len(watch.waits) >= 2
    with Watch() as watch:
        x[x > 1] = torch.zeros(1, dtype=x.dtype)
        x.unique()
    assert len(watch.waits) >= 2


@pytest.mark.parametrize(
    "named",
    [
        {},
        {"preset": "reference"},
        {"preset": "reference_fixed"},
        {"assignment": "nearest", "momentum_rule": "count_aware"},
    ],
    ids=["default", "reference", "reference_fixed", "nearest"],
)
def test_a_step_is_one_pass_over_all_classes_and_never_waits_for_a_value(way, named):
    counts = []
    for classes, seen in ((2, 2), (40, 2), (40, 40)):
        head = build(6, classes, reseed_after=1, **named) if not named.get("preset") else build(6, classes, **named)
        features, labels = batch(6, seen, size=(2, 8, 8), label_size=(16, 16))
        step(head, features, labels)
        with Watch() as watch:
            step(head, features, labels)
        assert watch.waits == []
        counts.append(watch.calls)
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("classes", [2, 150, 400])
@pytest.mark.parametrize("seen", [2, 90])
def test_clustering_and_update_are_at_most_thirty_operations(classes, seen):
    if not clustering_cpu.available():
        pytest.skip("no C compiler")
    head = PrototypeHead(16, classes, projection="none", ignore_index=255)
    features, labels = batch(16, min(seen, classes), size=(1, 24, 24), dtype=torch.float32)
    losses = head.losses(features, labels)
    own, chosen = torch.rand(576, 10) * 2 - 1, head._classes(labels, (24, 24))
    with Watch() as watch:
        head._assign(own, None, chosen, None, losses.embedding)
        head.update(losses)
    # 12 of them, each fused operator of ours one, whatever it allocates inside.
    assert watch.calls <= 30
    assert watch.waits == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", ["default", "reference", "reference_fixed"])
def test_a_step_never_waits_on_a_gpu(preset):
    head = build(6, 40, preset=preset).cuda()
    if preset == "default":
        head.reseed_after = 1
    features, labels = (t.cuda() for t in batch(6, 40, size=(2, 8, 8), label_size=(16, 16)))
    step(head, features, labels)  # what is made once is made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            step(head, features, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert head.prototypes.isfinite().all()
