"""What is timed side by side computes the same thing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from benchmarks import costs, inference, step
from torch.testing import assert_close

from heads import seeded
from protoseg.method.head import PrototypeHead


@pytest.mark.parametrize("label_size", [(5, 6), (20, 24), (17, 31)])
def test_the_strip_cross_entropy_is_the_plain_one(label_size):
    scores = torch.randn(2, 4, 5, 6, generator=seeded(0), dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (2, *label_size), generator=seeded(1))
    labels[:, 0] = step.VOID
    resized = F.interpolate(scores, size=label_size, mode="bilinear", align_corners=False)
    plain = F.cross_entropy(resized, labels, ignore_index=step.VOID)
    (expected,) = torch.autograd.grad(3 * plain, scores)
    loss = step.StripCrossEntropy.apply(scores, labels)
    assert_close(loss, plain, rtol=1e-12, atol=0)
    assert_close(torch.autograd.grad(3 * loss, scores)[0], expected, rtol=0, atol=1e-14)


@torch.no_grad()
@pytest.mark.parametrize("projected", [False, True])
def test_contestants_at_inference_give_the_same_answers(projected, monkeypatch):
    monkeypatch.setattr(inference, "SIDE", 16)
    monkeypatch.setattr(inference, "WIDE", 32)
    answers, kept, open_ = inference.contestants(inference.Shape(7, 32, projected), "cpu")
    given = {name: answer() for name, answer in answers.items()}
    close = {"rtol": 0, "atol": 1e-4}
    assert_close(given["conv, same product"].T.reshape(7, 16, 16), given["conv"][0], **close)
    for name in ("head", "frozen"):
        assert_close(given[name], given["plain"], **close)
    head, features = inference.trained(inference.Shape(7, 32, projected), "cpu")
    same = PrototypeHead(32, 7, projection="none", preset="reference").eval()
    same.prototypes.copy_(head.prototypes)
    assert_close(given["release"], same(head.projection(features)), rtol=0, atol=1e-3)
    for name in ("bf16", "int8"):
        assert_close(given[name], given["plain"], rtol=0, atol=20 * 0.03)
    assert given["frozen to pixels"].shape == given["head to pixels"].shape == given["release to pixels"].shape
    assert given["frozen to pixels"].shape == (1, 64, 64)
    assert min(kept.values()) > 0.98
    assert kept["frozen to pixels"] > 0.999
    assert torch.equal(given["frozen labels"], given["unscreened labels"])
    assert all(0 <= share < 0.1 for share in open_.values())
    ours, theirs = given["conv to pixels, our arg-max"], given["conv to pixels"]
    assert (ours == theirs).double().mean() > 0.999


def test_costs_are_of_each_variant_of_a_study_with_its_own_head_and_the_same_images():
    found = costs.recipes(Path("studies/synthetic.yaml"))
    small = {n: replace(r, batch_size=2, data=replace(r.data, crop_size=(32, 32))) for n, r in found.items()}
    steps = {name: costs.Step(small[name], 7, "cpu") for name in ("softmax", "K10", "K10-means")}
    assert len({each.images.sum().item() for each in steps.values()}) == 1
    before = {name: step.model.head.prototypes.clone() for name, step in steps.items() if name != "softmax"}
    for each in steps.values():
        weight = next(each.model.parameters()).clone()
        each()
        assert not torch.equal(next(each.model.parameters()), weight)
    moved = {name: steps[name].model.head.prototypes - start for name, start in before.items()}
    assert all(bool(by.any()) for by in moved.values())
    assert not torch.equal(moved["K10"], moved["K10-means"])
