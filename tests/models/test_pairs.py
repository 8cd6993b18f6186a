"""Runs of one seed are partners: their networks start alike, whatever the head, and see the same data."""

import pytest
import torch

from protoseg.config import Data, Head, Model
from protoseg.data import catalog, loading, transforms
from protoseg.data.dataset import SegmentationDataset
from protoseg.models import build

HEADS = {
    "softmax": Head(kind="softmax"),
    "softmax_projected": Head(kind="softmax_projected", embed_dim=16),
    "cosine": Head(kind="cosine", embed_dim=16),
    "prototypes": Head(embed_dim=16),
    "one prototype": Head(embed_dim=16, num_prototypes=1, momentum=0.999),
    "from data": Head(embed_dim=16, start="data"),
    "reference": Head(preset="reference", embed_dim=16),
}


def start(head, seed=3):
    torch.manual_seed(seed)
    model = build(Model(network="tiny", auxiliary_weight=0.4), head, 5)
    parts = ("backbone.", "decoder.", "auxiliary.", "head.projection.")
    return {name: value for name, value in model.state_dict().items() if name.startswith(parts)}


@pytest.mark.parametrize("name", HEADS)
def test_networks_of_one_seed_start_alike_whatever_the_head(name):
    ours, theirs = start(HEADS[name]), start(HEADS["cosine"])
    shared = ours.keys() & theirs.keys()
    parts = {key.split(".")[0] for key in shared}
    assert parts >= {"backbone", "decoder", "auxiliary"}
    assert any(key.startswith("head.projection") for key in shared) == (name != "softmax")
    for key in shared:
        assert torch.equal(ours[key], theirs[key]), key


def test_another_seed_starts_elsewhere():
    ours, theirs = start(HEADS["cosine"]), start(HEADS["cosine"], seed=4)
    for part in ("backbone", "decoder", "auxiliary", "head"):
        assert any(not torch.equal(ours[key], theirs[key]) for key in ours if key.startswith(part)), part


def test_the_data_does_not_depend_on_what_was_drawn_before():
    data = Data(crop_size=(32, 48), length=12, workers=0)

    def batches(head):
        torch.manual_seed(0)
        build(Model(network="tiny"), head, 7)
        source = catalog.find(data, "train")
        dataset = SegmentationDataset(source, transforms.training(data, source.labels, 0))
        return list(loading.training_loader(dataset, batch=4, seed=0))

    for one, other in zip(batches(HEADS["softmax"]), batches(HEADS["prototypes"]), strict=True):
        for name in ("image", "label", "index"):
            assert torch.equal(one[name], other[name])
