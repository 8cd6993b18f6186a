"""One path from a model and a split to scores."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rank_processes
import scoring_worker
from protoseg.config import DataError, Evaluation
from protoseg.engine.metrics import BoundaryIoU, ConfusionMatrix
from protoseg.engine.scoring import score
from protoseg.engine.windows import segment


class Painter(nn.Module):
    """A segmenter whose scores are the colour channels; notes the mode it is called in."""

    def __init__(self):
        super().__init__()
        self.head = nn.Module()
        self.head.num_classes, self.head.ignore_index = 3, 255
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("mean", torch.zeros(1))
        self.modes = []

    def forward(self, images):
        self.modes.append(self.training)
        return self.norm(images.float() / 20)


def batches(count=3, size=(12, 16), value=None):
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        image = torch.randint(0, 256, (1, 3, *size), generator=generator, dtype=torch.uint8)
        label = torch.randint(0, 3, (1, 2 * size[0], 2 * size[1] + 1), generator=generator)
        label[0, 0] = 255
        if value is not None:
            label[0, 5, 5] = value
        yield {"image": image, "label": label, "name": [f"item_{i}"]}


def test_scores_are_those_of_the_pieces_at_label_size():
    model, evaluation = Painter().eval(), Evaluation(flip=True)
    scores = score(model, batches(), evaluation, boundary=True, calibration=True)
    matrix, edges = ConfusionMatrix(3), BoundaryIoU(3)
    for batch in batches():
        predicted = segment(model, batch["image"][0], evaluation, tuple(batch["label"].shape[-2:])).argmax(0)
        matrix.update(predicted, batch["label"][0])
        edges.update(predicted, batch["label"][0])
    assert torch.equal(scores.matrix, matrix.compute())
    assert scores.overlap.miou == matrix.overlap().miou
    assert torch.equal(scores.boundary_iou, edges.compute())
    assert 0 <= scores.calibration_error <= 1
    assert scores.images == 3
    assert scores.seconds > 0
    assert scores.distinctness == {}


def test_the_model_is_in_eval_mode_meanwhile_and_each_part_gets_its_own_back():
    model = Painter().train()
    model.norm.eval()  # a frozen part
    statistics = model.norm.running_mean.clone()
    score(model, batches(), Evaluation())
    assert model.modes == [False] * 3
    assert model.training
    assert not model.norm.training
    assert torch.equal(model.norm.running_mean, statistics)


def test_a_wrong_label_names_its_image_and_modes_come_back():
    model = Painter().train()
    with pytest.raises(DataError, match=r"item_0.*value 7"):
        score(model, batches(value=7), Evaluation())
    assert model.training


@pytest.fixture(scope="module")
def ranks_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    rank_processes.run(Path(scoring_worker.__file__), folder, 3, 180)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="needs the loopback interface by its Linux name")
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_and_images_gives_the_scores_of_one(ranks_folder, world):
    for count in range(1, scoring_worker.LARGEST + 1):  # with fewer images than ranks, some rank has none
        alone = scoring_worker.scores(count)
        for rank in range(world):
            matrix, boundary_iou, calibration_error = torch.load(ranks_folder / f"{world}-{count}-{rank}.pt")
            assert torch.equal(matrix, alone.matrix)
            assert torch.equal(boundary_iou.nan_to_num(-1), alone.boundary_iou.nan_to_num(-1))
            assert calibration_error == pytest.approx(alone.calibration_error, rel=1e-9)
