"""The rival that `studies/purity.py --cluster` fits to a network which was trained without prototypes."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from heads import seeded
from protoseg.config import UserError
from protoseg.method.similarity import unit

SCRIPT = Path(__file__).parents[1] / "studies" / "purity.py"
SPEC = importlib.util.spec_from_file_location("purity", SCRIPT)
purity = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(purity)

COLOURS = torch.tensor([[200, 10, 10], [10, 200, 10], [10, 10, 200], [200, 200, 10]], dtype=torch.uint8)
CELL = 4  # pixels of a picture along a side of a feature pixel


class Colours(nn.Module):
    """A network whose features are the colours of cells, of pictures padded to whole ones."""

    multiple = CELL

    def __init__(self, num_classes):
        super().__init__()
        self.head = SimpleNamespace(num_classes=num_classes, embed_dim=3, projection=nn.Identity())

    def features(self, images):
        padded = F.pad(images.float(), (0, -images.shape[3] % CELL, 0, -images.shape[2] % CELL))
        return F.avg_pool2d(padded, CELL)


def pictures(count, rows=5, columns=7):
    """Cells of four colours, the last of them cut; the first two are class 0, the others class 1, each a look."""
    for i in range(count):
        look = torch.randint(4, (rows, columns), generator=seeded(i))
        wide = look.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)[:-1, :-2]
        yield COLOURS[wide].permute(2, 0, 1), wide // 2, wide


@pytest.fixture
def predictor():
    return SimpleNamespace(segmenter=Colours(2), names=["warm", "cold"], _sizes=None)


@pytest.fixture(autouse=True)
def no_resize(monkeypatch):
    monkeypatch.setattr(purity, "resize_image", lambda image, sizes: image)


def test_embeddings_are_of_the_cells_under_the_pixels(predictor):
    found = purity.embeddings(predictor, pictures(3), seeded(0))
    for c, rows in enumerate(found):
        colours = unit(COLOURS[2 * c : 2 * c + 2].float())
        # padding darkens a cell that ends outside the picture, which keeps the direction
        assert_close((rows @ colours.T).amax(1), torch.ones(len(rows)), rtol=0, atol=1e-6)


def test_centres_find_the_looks_and_answer_in_the_place_of_prototypes(predictor):
    purity.cluster(predictor, pictures(3), 2)
    found = predictor.segmenter.head.prototypes
    for c in range(2):
        cosines = found[c] @ unit(COLOURS[2 * c : 2 * c + 2].float()).T
        assert_close(cosines.amax(1).sort().values, torch.ones(2), rtol=0, atol=1e-6)
        assert cosines.argmax(1).tolist() in ([0, 1], [1, 0])


def test_a_class_with_too_few_pixels_is_named(predictor):
    predictor.segmenter = Colours(3)
    predictor.names.append("none")
    with pytest.raises(UserError, match="0 pixels of class none"):
        purity.cluster(predictor, pictures(1), 2)
