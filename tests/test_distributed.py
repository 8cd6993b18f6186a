"""Any number of ranks computes what one process computes on the concatenated batch, in float64 over gloo."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import rank_processes
from distributed_worker import IMAGES, STEPS, VARIANTS, VOID, Net, global_batch, train
from heads import reference_weights
from oracles import reference

EXACT = [variant for variant in VARIANTS if variant != "reference"]
WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module", params=["1", "0"], ids=["as they are", "without a compiler"])
def folder(request, tmp_path_factory):
    """Where the ranks, one process each, have left what they saw; once without the operators that a compiler makes."""
    folder = tmp_path_factory.mktemp("ranks")
    rank_processes.run(WORKER, folder, max(IMAGES), 180, PROTOSEG_NATIVE=request.param)
    return folder


@pytest.fixture(params=[2, 3], ids=["two ranks", "three ranks, one all void"])
def ranks(request, folder):
    """(world, [what rank 0 saw, what rank 1 saw, ...])."""
    return request.param, [torch.load(folder / f"{request.param}-{rank}.pt") for rank in range(request.param)]


def results(ranks, variant):
    return [seen["results"][variant] for seen in ranks[1]]


@pytest.mark.parametrize("variant", EXACT)
def test_ranks_give_each_pixel_the_prototype_that_one_process_gives(ranks, variant):
    single = train(variant, ranks[0], None)
    for step in range(STEPS):
        together = torch.cat([seen["assignment"][step] for seen in results(ranks, variant)])
        assert torch.equal(together, single["assignment"][step])


@pytest.mark.parametrize("variant", EXACT)
def test_ranks_hold_the_prototypes_of_one_process(ranks, variant):
    single = train(variant, ranks[0], None)
    for seen in results(ranks, variant):
        for step in range(STEPS):
            assert_close(seen["prototypes"][step], single["prototypes"][step], rtol=0, atol=1e-12)
        assert_close(seen["buffers"], single["buffers"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", [*EXACT, "reference"])
def test_ranks_never_drift_apart_by_a_bit(ranks, variant):
    first, *others = results(ranks, variant)
    for seen in others:
        for step in range(STEPS):
            assert torch.equal(seen["prototypes"][step], first["prototypes"][step])
            assert torch.equal(seen["gradient"][step], first["gradient"][step])


@pytest.mark.parametrize("variant", EXACT)
def test_losses_averaged_over_ranks_and_their_gradient_are_those_of_one_process(ranks, variant):
    single = train(variant, ranks[0], None)
    for step in range(STEPS):
        for name in ("total", "ce", "ppc", "ppd"):
            mean = torch.stack([seen[name][step] for seen in results(ranks, variant)]).mean()
            assert_close(mean, single[name][step], rtol=0, atol=1e-12)
        for seen in results(ranks, variant):
            assert_close(seen["gradient"][step], single["gradient"][step], rtol=0, atol=1e-12)
    for seen in results(ranks, variant):
        assert_close(seen["parameters"], single["parameters"], rtol=0, atol=1e-11)


def test_a_class_that_one_rank_sees_moves_on_all_and_rests_when_nobody_does(ranks):
    for seen in results(ranks, "default"):
        moved = [not torch.equal(seen["before"][step][3], seen["prototypes"][step][3]) for step in range(STEPS)]
        assert moved == [True, False, True]


def test_the_re_seeded_prototype_is_a_pixel(ranks):
    # Otherwise the variant would agree because nothing happens in it.
    single = train("re-seeding", ranks[0], None)
    assert (single["prototypes"][0][:, 1] - single["before"][0][:, 1]).norm(dim=-1).min() > 1e-3


def test_the_reference_clusters_each_rank_alone_and_averages_unit_vectors(ranks):
    world, net = ranks[0], Net("reference")
    alone = []
    for rank, seen in enumerate(results(ranks, "reference")):
        images, labels, gumbel = (tensor[IMAGES[world][rank]] for tensor in global_batch(0, world))
        slow = reference.step(
            net.trunk(images).detach(),
            torch.where(labels == VOID, -1, labels),
            reference_weights(net.head),
            seen["before"][0],
            gumbel.flatten(0, 1),
        )
        assert torch.equal(seen["assignment"][0].flatten(), slow.index)
        assert_close(seen["total"][0], slow.total, rtol=0, atol=1e-10)
        alone.append(slow.prototypes)
    expected = reference.unit(reference.average_over_ranks(alone))  # unit again at the next forward
    for seen in results(ranks, "reference"):
        assert_close(reference.unit(seen["prototypes"][0]), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("fact", ["broken default", "broken reference", "nothing labelled"])
def test_what_moves_nothing_on_one_rank_moves_nothing_on_any(ranks, fact):
    assert all(seen["facts"][fact] for seen in ranks[1])
