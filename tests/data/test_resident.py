"""Pictures in memory give the samples of the files: the same bits on the CPU, the same place after a restart."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from picture_trees import write_folder_set
from protoseg.config import Data, DataError, UserError
from protoseg.data import catalog, resident, transforms
from protoseg.data.dataset import SegmentationDataset
from protoseg.data.loading import BatchOrder, training_loader

CPU = torch.device("cpu")
DATA = Data(length=14, crop_size=(16, 24), resident=True)


def source_of(data):
    return catalog.find(data, "train")


def loader(data=DATA, batch=4, seed=1, rank=0, world=1, accumulate=1, workers=0):
    source = source_of(data)
    order = BatchOrder(len(source), batch, seed, rank, world, accumulate)
    return resident.ResidentLoader(source, resident.load(source, CPU, workers), data, order, workers)


def of_files(data=DATA, batch=4, seed=1, **where):
    source = source_of(data)
    dataset = SegmentationDataset(source, transforms.training(data, source.labels, seed))
    return training_loader(dataset, batch=batch, seed=seed, **where)


def assert_same(one, other):
    assert one["name"] == other["name"]
    for name in ("index", "image", "label"):
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_files(workers):
    ours, theirs = loader(workers=workers), of_files()
    assert len(ours) == len(theirs) == 3
    for _ in range(2):
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)


def test_ranks_and_micro_batches_read_their_share_of_the_same_order():
    for rank in range(2):
        where = {"batch": 2, "rank": rank, "world": 2, "accumulate": 2}
        for one, other in zip(loader(**where), of_files(**where), strict=True):
            assert_same(one, other)


def test_a_checkpoint_of_either_loader_continues_with_the_other():
    for stop in (0, 2, 3, 5):
        whole = of_files()
        expected = [batch for _ in range(3) for batch in whole]
        for first, second in ((loader(), of_files()), (of_files(), loader())):
            got, state = 0, first.state_dict()
            while got < stop:
                for _ in first:
                    got += 1
                    state = first.state_dict()
                    if got == stop:
                        break
            second.load_state_dict(state)
            rest = list(second)
            while len(rest) < len(expected) - stop:
                rest += list(second)
            for one, other in zip(rest, expected[stop:], strict=True):
                assert_same(one, other)


def test_a_threaded_loader_that_is_left_early_stops():
    walk = iter(loader(workers=2))
    next(walk)
    walk.close()  # hangs if a thread waits for somebody to take its batch


@pytest.fixture
def folder_set(tmp_path):
    """Pairs of several sizes."""
    write_folder_set(tmp_path)
    draw = torch.Generator().manual_seed(0)
    for number, (height, width) in enumerate([(21, 34), (50, 19), (16, 24)]):
        for kind, shape, top in (("images", (height, width, 3), 256), ("masks", (height, width), 2)):
            content = torch.randint(0, top, shape, generator=draw, dtype=torch.uint8).numpy()
            Image.fromarray(content).save(tmp_path / "train" / kind / f"more{number}.png")
    return Data(name="folder", root=str(tmp_path), crop_size=(16, 24))


def test_pictures_of_several_sizes_lie_one_after_the_other(folder_set):
    source = source_of(folder_set)
    pictures = resident.load(source, CPU)
    assert len(set(pictures.sizes)) > 2
    plain = SegmentationDataset(source)
    for index in range(len(source)):
        assert torch.equal(pictures.image(index), plain[index]["image"])
        assert torch.equal(pictures.label(index).long(), plain[index]["label"])


def test_an_unreadable_file_is_named(folder_set, tmp_path):
    (tmp_path / "train" / "images" / "more1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match=r"more1\.png: cannot be decoded"):
        resident.load(source_of(folder_set), CPU, workers=1)


def test_a_set_that_does_not_fit_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(resident, "free_memory", lambda _: 14 * 16 * 24 * 4 * 2 - 1)
    monkeypatch.setattr(resident, "read", None)
    with pytest.raises(UserError, match=r"14 pairs of synthetic/train are 0\.00 GB .* data\.resident false"):
        resident.load(source_of(DATA), CPU)
    monkeypatch.undo()
    monkeypatch.setattr(resident, "free_memory", lambda _: 14 * 16 * 24 * 4 * 2)
    resident.load(source_of(DATA), CPU)


def test_free_memory_is_a_plausible_number():
    assert resident.free_memory(CPU) > 10_000_000


def test_many_classes_keep_their_numbers():
    source = source_of(DATA)
    wide = replace(source, labels=replace(source.labels, ignore_index=1000))
    pictures = resident.load(wide, CPU)
    assert pictures.labels.dtype == torch.int32
    assert torch.equal(pictures.labels, resident.load(source, CPU).labels.int())


def test_impossible_settings_are_refused_when_built():
    with pytest.raises(DataError, match="scale_range"):
        loader(replace(DATA, scale_range=(2.0, 1.0)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_labels_and_nearly_the_same_colours():
    data = replace(DATA, crop_size=(64, 96))
    source = source_of(data)
    pictures = resident.load(source, torch.device("cuda"))
    ours = resident.ResidentLoader(source, pictures, data, BatchOrder(14, 4, 1), workers=2)
    for one, other in zip(ours, of_files(data), strict=True):
        assert one["image"].is_cuda
        assert torch.equal(one["label"].cpu(), other["label"])
        assert torch.equal(one["index"].cpu(), other["index"])
        assert (one["image"].cpu().int() - other["image"].int()).abs().max() <= 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cutting_never_waits_for_the_gpu():
    source = source_of(DATA)
    pictures = resident.load(source, torch.device("cuda"))
    walk = iter(resident.ResidentLoader(source, pictures, DATA, BatchOrder(14, 4, 1)))
    next(walk)  # libraries wait once, when they start
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(walk)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_device_way_draws_the_same_samples(folder_set, workers):
    """What a GPU runs, on the CPU: several sizes in a batch, against the loader of files."""
    data = replace(folder_set, photometric=False)
    source = source_of(data)
    plain = of_files(data, batch=2)
    ours = resident.ResidentLoader(source, resident.load(source, CPU), data, BatchOrder(len(source), 2, 1))
    ours.cuts = resident.draw_loader(ours.draws, ours.order, workers)
    for _ in range(6):
        ours._begin()
        for one, other in zip(ours._cut_together(), plain, strict=True):
            assert one["name"] == other["name"]
            assert torch.equal(one["label"], other["label"])
            assert_close(one["image"].int(), other["image"].int(), rtol=0, atol=2)
