"""Classes over ranks compute what the unsharded head computes in one process, in float64 over gloo."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import rank_processes
from protoseg.method.head import PrototypeHead
from protoseg.method.sharded import PER_CLASS, ShardedPrototypeHead
from sharded_worker import CLASSES, IMAGES, STEPS, VARIANTS, alone, gradients

WORKER = Path(__file__).with_name("sharded_worker.py")
EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    rank_processes.run(WORKER, folder, max(IMAGES), 600)
    return folder


@pytest.fixture(params=[2, 3], ids=["two ranks", "three ranks, one all void"])
def world(request):
    return request.param


@pytest.fixture
def ranks(world, folder):
    return [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]


@pytest.fixture(params=VARIANTS)
def results(request, ranks, world):
    """What one process saw, and what each rank saw."""
    return alone(request.param, world), [seen["results"][request.param] for seen in ranks]


def test_every_rank_holds_the_losses_of_one_process(results):
    single, seen = results
    for step in range(STEPS):
        for rank in seen:
            for name in ("total", "ce", "ppc", "ppd"):
                assert_close(rank[name][step], single[name][step], **EXACT)


def test_gradients_after_data_parallel_averaging_are_those_of_one_process(results):
    single, seen = results
    for step in range(STEPS):
        for rank in seen:
            assert_close(rank["gradient"][step], single["gradient"][step], **EXACT)


def test_each_pixel_gets_the_prototype_that_one_process_gives(results):
    single, seen = results
    for step in range(STEPS):
        together = torch.cat([rank["assignment"][step] for rank in seen])
        assert torch.equal(together, single["assignment"][step])


def test_the_gathered_memory_is_that_of_one_process(results):
    single, seen = results
    for step in range(STEPS):
        for rank in seen:
            assert rank["state"][step].keys() == single["state"][step].keys()
            assert_close(rank["state"][step]["prototypes"], single["state"][step]["prototypes"], **EXACT)
            assert_close(rank["state"][step], single["state"][step], rtol=0, atol=1e-9)  # weights go up to 100,000


def test_scores_of_a_ranks_images_are_those_of_one_process(results):
    single, seen = results
    for step in range(STEPS):
        together = torch.cat([rank["scores"][step] for rank in seen])
        assert_close(together, single["scores"][step], rtol=0, atol=1e-11)
        for rank in seen:
            assert rank["distinctness"][step] == pytest.approx(single["distinctness"][step], abs=1e-6)


def test_a_start_anew_is_the_first_ranks_and_that_of_one_process(results):
    single, seen = results
    for rank in seen:
        for name in (*PER_CLASS, "log_scale"):
            assert torch.equal(rank["anew"][0][name], single["anew"][0][name]), name
    assert not torch.equal(single["anew"][0]["prototypes"], single["state"][-1]["prototypes"])


def test_the_variants_are_worth_comparing(results):
    single, _ = results
    first, last = single["state"][0]["prototypes"], single["state"][-1]["prototypes"]
    assert not torch.equal(first, last)
    assert all(gradient.abs().max() > 1e-3 for gradient in single["gradient"])


def test_gradients_of_parts_and_of_scores_go_home_to_the_rank_they_came_from(ranks, world):
    single = gradients(world, None)
    for name, value in single.items():
        found = [seen["gradients"][name] for seen in ranks]
        if name.endswith("scale") and name.startswith("scores"):
            assert_close(torch.stack(found).sum(), value, **EXACT)
        elif name.endswith("scale"):
            assert_close(torch.stack(found).mean(), value, **EXACT)  # as data-parallel training averages
        else:
            assert_close(torch.cat(found), value, **EXACT)


def test_a_whole_state_is_split_over_ranks_and_gathered_again(ranks, world):
    assert all(seen["saved"]["round trip"] for seen in ranks)
    assert [seen["saved"]["rows"] for seen in ranks] == {2: [3, 2], 3: [2, 2, 1]}[world]


def test_the_start_is_the_first_ranks(ranks):
    torch.manual_seed(0)
    start = PrototypeHead(6, CLASSES, num_prototypes=3, embed_dim=6).prototypes
    for seen in ranks:
        assert_close(seen["saved"]["start"], start)


def test_a_loss_that_is_not_finite_on_one_rank_moves_nothing_on_any(ranks):
    assert all(seen["saved"]["broken rests"] for seen in ranks)


def test_sizes_that_differ_between_ranks_are_refused_on_all(ranks):
    for seen in ranks:
        assert "one size on all ranks, given rank 0: (4, 5)" in seen["saved"]["sizes"]


def test_one_rank_holds_all_classes_and_is_the_head():
    torch.manual_seed(0)
    sharded = ShardedPrototypeHead(6, 4)
    torch.manual_seed(0)
    head = PrototypeHead(6, 4)
    features, labels = torch.randn(2, 6, 3, 4), torch.randint(4, (2, 6, 8))
    one, two = sharded.losses(features, labels), head.losses(features, labels)
    assert torch.equal(one.total, two.total)
    assert torch.equal(one.assignment, two.assignment)
    for each, losses in ((sharded, one), (head, two)):
        each.update(losses)
    assert_close(sharded.whole_state_dict(), dict(head.state_dict()), rtol=0, atol=0)
    assert torch.equal(sharded(features), head(features))


@pytest.mark.parametrize(
    "named", [{"score_norm": "layer_norm"}, {"across_ranks": "average"}, {"distance": "huber"}, {"preset": "reference"}]
)
def test_what_ties_classes_together_cannot_be_sharded(named):
    with pytest.raises(ValueError, match="cannot be sharded"):
        ShardedPrototypeHead(6, 4, **named)


def test_a_part_is_not_taken_for_a_whole():
    sharded = ShardedPrototypeHead(6, 4)
    with pytest.raises(ValueError, match="prototypes holds 3 classes, expected all 4"):
        sharded.load_whole_state_dict({**sharded.state_dict(), "prototypes": torch.ones(3, 10, 256)})
