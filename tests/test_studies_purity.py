"""`studies/purity.py` in its three forms, on small untrained models; the counts are those of `engine.looks`. And the
rival that `--cluster` fits to a network which was trained without prototypes."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.testing import assert_close

from heads import seeded
from protoseg.config import UserError
from protoseg.data import synthetic
from protoseg.engine.looks import similarities
from protoseg.method.similarity import unit
from protoseg.tasks.prediction import load
from saved_models import SMALL, save_small, small_run

FILE = Path(__file__).parents[1] / "studies" / "purity.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("purity_script", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed(capsys):
    """Class -> (purity, chance), as printed."""
    found = re.findall(r" (\w+): purity (\S+), without knowing looks (\S+)", capsys.readouterr().out)
    return {name: (float(purity), float(chance)) for name, purity, chance in found}


def test_looks_of_pictures(script, tmp_path, capsys):
    run = save_small(tmp_path / "model")
    scenes = synthetic.scenes("test", 32, (40, 56))
    folder = tmp_path / "images"
    folder.mkdir()
    lines = []
    for i in range(4):
        Image.fromarray(scenes.item(i)[0]).save(folder / f"{i}.png")
        lines.append(f"{i} {'ab'[i % 2]}\n")
    (tmp_path / "list.txt").write_text("".join(lines))
    script.main([str(tmp_path / "list.txt"), str(folder), str(run)])
    found = printed(capsys)
    assert set(found) == set(synthetic.LABELS.names)
    # by hand: shares of the pixels of each look that are given a prototype, every picture counted alike
    predictor = load(run)
    table = torch.zeros(7, 3, 2, dtype=torch.float64)
    for i in range(4):
        cosine = similarities(predictor.segmenter, torch.from_numpy(scenes.item(i)[0]).permute(2, 0, 1))
        best = cosine.flatten(0, 1).argmax(0)
        for j in range(21):
            table[j // 3, j % 3, i % 2] += (best == j).double().mean()
    for name, part in zip(synthetic.LABELS.names, table):
        if (part.sum(0) > 0).all():
            by_hand = (part / part.sum(0)).amax(1).sum().item() / 2
            assert found[name] == (pytest.approx(by_hand, abs=0.006), 0.5)


def test_looks_of_generated_scenes(script, tmp_path, capsys):
    run = small_run(tmp_path / "run")
    script.main(["--generated", str(run)])
    found = printed(capsys)
    predictor = load(run)
    scenes = synthetic.scenes("test", SMALL.length, SMALL.crop_size, SMALL.limit)
    counts = np.zeros((7, 3, 4))
    for i in range(scenes.count):
        image, label = scenes.item(i)
        cosine = similarities(predictor.segmenter, torch.from_numpy(image).permute(2, 0, 1)).numpy()
        looks = scenes.looks(i)
        for row, column in np.ndindex(label.shape):
            c = label[row, column]
            counts[c, cosine[c, :, row, column].argmax(), looks[row, column]] += 1
    for c, name in enumerate(synthetic.LABELS.names):
        there = counts[c][:, counts[c].sum(0) > 0]
        share = there / there.sum(0)
        assert found[name][0] == pytest.approx(share.max(1).sum() / there.shape[1], abs=0.006)
        assert found[name][1] == pytest.approx(1 / there.shape[1], abs=0.006)


def merged(folder):
    """Two pictures with four raw ids, and two descriptions of them: two classes, and the four looks."""
    for part in ("images", "masks"):
        (folder / part).mkdir()
    draw = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(draw.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
        mask = draw.integers(0, 4, (40, 56), dtype=np.uint8)
        mask[:4] = 9
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    split = "test: {images: images, masks: masks}\nignore: [9]\n"
    (folder / "two.yaml").write_text(
        split + "classes: {0: one, 1: two}\nlabel_map: {0: 0, 1: 0, 2: 1, 3: 0}\n"  # look 2 is class two
    )
    (folder / "four.yaml").write_text(split + "classes: [a, b, c, d]\n")
    return ["--classes", str(folder / "two.yaml"), "--looks", str(folder / "four.yaml"), "--root", str(folder)]


def test_looks_are_the_classes_of_a_finer_description(script, tmp_path, capsys):
    words = merged(tmp_path)
    run = save_small(tmp_path / "model", names=("one", "two"))
    script.main([*words, str(run)])
    found = printed(capsys)
    assert found["two"] == (1.0, 1.0)  # a single look
    assert found["one"][1] == pytest.approx(1 / 3, abs=0.006)
    assert found["one"][0] < 0.45  # the masks are noise: nothing could have been found


def test_what_does_not_belong_together_is_refused(script, tmp_path):
    words = merged(tmp_path)
    with pytest.raises(UserError, match="knows the classes sky"):
        script.main([*words, str(save_small(tmp_path / "model"))])
    with pytest.raises(SystemExit):
        script.main([*words[:2], str(tmp_path / "model")])
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / "model")])
    (tmp_path / "four.yaml").write_text("test: {images: images/0.png, masks: masks}\nclasses: [a, b, c, d]\n")
    with pytest.raises(UserError, match="name different pictures in 'test'"):
        script.main([*words, str(tmp_path / "model")])


# --- clusters made afterwards ---------------------------------------------------------------------------------------

COLOURS = torch.tensor([[200, 10, 10], [10, 200, 10], [10, 10, 200], [200, 200, 10]], dtype=torch.uint8)
CELL = 4  # pixels of a picture along a side of a feature pixel


class Colours(nn.Module):
    """A network whose features are the colours of cells, of pictures padded to whole ones."""

    def __init__(self, num_classes):
        super().__init__()
        self.head = SimpleNamespace(num_classes=num_classes, embed_dim=3, projection=nn.Identity(), ignore_index=255)
        self.backbone, self.decoder = nn.AvgPool2d(CELL), nn.Identity()

    def _prepare(self, images):
        return F.pad(images.float(), (0, -images.shape[3] % CELL, 0, -images.shape[2] % CELL))


def pictures(count, rows=5, columns=7):
    """Cells of four colours, the last of them cut; the first two are class 0, the others class 1, each a look."""
    for i in range(count):
        look = torch.randint(4, (rows, columns), generator=seeded(i))
        wide = look.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)[:-1, :-2]
        yield COLOURS[wide].permute(2, 0, 1), wide // 2, wide


@pytest.fixture
def colours(script, monkeypatch):
    monkeypatch.setattr(script, "resize_image", lambda image, sizes: image)
    return SimpleNamespace(segmenter=Colours(2), names=["warm", "cold"], _sizes=None)


def test_embeddings_are_of_the_cells_under_the_pixels(script, colours):
    found = script.embeddings(colours, pictures(3), seeded(0))
    for c, rows in enumerate(found):
        colours = unit(COLOURS[2 * c : 2 * c + 2].float())
        # padding darkens a cell that ends outside the picture, which keeps the direction
        assert_close((rows @ colours.T).amax(1), torch.ones(len(rows)), rtol=0, atol=1e-6)


def test_centres_find_the_looks_and_answer_in_the_place_of_prototypes(script, colours):
    script.cluster(colours, pictures(3), 2)
    found = colours.segmenter.head.prototypes
    for c in range(2):
        cosines = found[c] @ unit(COLOURS[2 * c : 2 * c + 2].float()).T
        assert_close(cosines.amax(1).sort().values, torch.ones(2), rtol=0, atol=1e-6)
        assert cosines.argmax(1).tolist() in ([0, 1], [1, 0])


def test_a_class_with_too_few_pixels_is_named(script, colours):
    colours.segmenter = Colours(3)
    colours.names.append("none")
    with pytest.raises(UserError, match="0 pixels of class none"):
        script.cluster(colours, pictures(1), 2)
