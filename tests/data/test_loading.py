"""A loader that is stopped anywhere continues with the next batch, and ranks share one global order."""

from dataclasses import replace

import pytest
import torch

from protoseg.config import Data, DataError, UserError
from protoseg.data import catalog, transforms
from protoseg.data.dataset import SegmentationDataset
from protoseg.data.loading import BatchOrder, epoch_order, evaluation_loader, training_loader


def dataset(length=14, transform=True):
    data = Data(length=length, crop_size=(16, 24))
    source = catalog.find(data, "train")
    return SegmentationDataset(source, transforms.training(data, source.labels, 3) if transform else None)


def global_batches(items, world, batch, accumulate, epochs=2, seed=1):
    """The items of every optimiser step over all ranks."""
    orders = [BatchOrder(items, batch, seed, rank, world, accumulate) for rank in range(world)]
    steps = []
    for epoch in range(epochs):
        micro = []
        for order in orders:
            order.epoch = epoch
            micro.append(list(order))
        for first in range(0, len(micro[0]), accumulate):
            steps.append({pair for rank in micro for part in rank[first : first + accumulate] for pair in part})
    return steps


@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 2, 1), (2, 1, 2), (4, 1, 1), (1, 1, 4)])
def test_the_global_batch_does_not_depend_on_ranks_or_accumulation(shape):
    assert global_batches(14, *shape) == global_batches(14, 1, 4, 1)


def test_an_epoch_shows_every_item_at_most_once_and_drops_the_rest():
    steps = global_batches(14, 1, 4, 1)
    assert len(steps) == 6
    assert all(len(step) == 4 for step in steps)
    for epoch in range(2):
        seen = [index for step in steps[3 * epoch : 3 * epoch + 3] for e, index in step if e == epoch]
        assert len(seen) == len(set(seen)) == 12


def test_order_is_a_function_of_seed_and_epoch():
    assert epoch_order(50, 1, 0).tolist() == epoch_order(50, 1, 0).tolist()
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_loader_continues_with_the_next_batch(workers):
    def fresh():
        return training_loader(dataset(), batch=4, seed=1, workers=workers)

    whole = fresh()
    expected = [batch for _ in range(3) for batch in whole]
    assert len(expected) == 9
    for stop in (0, 1, 2, 3, 4, 7):
        first = fresh()
        got, state = [], first.state_dict()
        while len(got) < stop:
            for batch in first:
                got.append(batch)
                state = first.state_dict()
                if len(got) == stop:
                    break
        second = fresh()
        second.load_state_dict(state)
        assert second.state_dict()["items"] == 14
        while len(got) < 9:
            got += list(second)
        for a, b in zip(got, expected):
            assert a["name"] == b["name"]
            assert torch.equal(a["index"], b["index"])
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["label"], b["label"])


def test_the_place_holds_on_another_number_of_ranks():
    one = training_loader(dataset(16), batch=4, seed=1)
    walk = iter(one)
    first = [next(walk)["index"].tolist() for _ in range(2)]
    state = one.state_dict()
    two = [training_loader(dataset(16), batch=2, seed=1, rank=rank, world=2) for rank in range(2)]
    rest = []
    for loader in two:
        loader.load_state_dict(state)
        rest += [index for batch in loader for index in batch["index"].tolist()]
    assert sorted(rest + [i for part in first for i in part]) == list(range(16))


def test_the_loader_does_not_touch_the_global_random_state():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    list(training_loader(dataset(), batch=4, seed=1))
    assert torch.equal(state, torch.get_rng_state())


def test_batches_have_the_promised_form():
    batch = next(iter(training_loader(dataset(), batch=3, seed=0)))
    assert batch["image"].shape == (3, 3, 16, 24)
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous()
    assert batch["label"].shape == (3, 16, 24)
    assert batch["label"].dtype == torch.int64
    assert batch["index"].dtype == torch.int64
    assert batch["name"] == [f"scene_0_{i:05d}" for i in batch["index"]]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("items", range(1, 10))
def test_evaluation_sees_every_image_once(items, world):
    seen = [
        index
        for rank in range(world)
        for batch in evaluation_loader(dataset(items, transform=False), rank=rank, world=world)
        for index in batch["index"].tolist()
    ]
    assert sorted(seen) == list(range(items))


def test_cached_items_are_the_same_items():
    plain, kept = dataset(), SegmentationDataset(replace(dataset().source, cache=True), dataset().transform)
    assert (plain._kept, kept._kept) == (None, {})
    for epoch in range(2):
        for index in range(4):
            assert torch.equal(plain[epoch, index]["image"], kept[epoch, index]["image"])
            assert torch.equal(plain[epoch, index]["label"], kept[epoch, index]["label"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_in_a_file_reads_the_same_from_a_worker(tmp_path, workers):
    from picture_trees import write_folder_set

    write_folder_set(tmp_path)
    (tmp_path / "train" / "images" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    data = Data(name="folder", root=str(tmp_path))
    loader = evaluation_loader(SegmentationDataset(catalog.find(data, "train")), workers=workers)
    with pytest.raises(DataError) as caught:
        list(loader)
    assert str(caught.value).startswith(str(tmp_path / "train" / "images" / "b.png"))
    assert "\n" not in str(caught.value)


def test_too_little_data_for_one_batch_is_refused():
    with pytest.raises(UserError, match="14 training pairs do not fill one global batch of 16"):
        training_loader(dataset(), batch=8, seed=0, world=2)


def test_another_data_set_or_seed_cannot_continue_a_run():
    state = training_loader(dataset(14), batch=4, seed=1).state_dict()
    with pytest.raises(UserError, match="training pairs 14, now 12"):
        training_loader(dataset(12), batch=4, seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="seed 1, now 2"):
        training_loader(dataset(14), batch=4, seed=2).load_state_dict(state)
    with pytest.raises(UserError, match="no global batch of 5 ends at"):
        training_loader(dataset(14), batch=5, seed=1).load_state_dict({**state, "items_done": 4})
