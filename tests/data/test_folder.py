"""Your own data: what the YAML may say, and that a contradiction in it is a sentence."""

import numpy as np
import pytest
from PIL import Image

from picture_trees import write_folder_set, write_image, write_mask, write_pairs
from protoseg.config import Data, DataError
from protoseg.data import catalog
from protoseg.data.dataset import SegmentationDataset, read


def find(root, split="train", file=""):
    return catalog.find(Data(name="folder", root=str(root), file=str(file)), split)


def described(root, text, split="train"):
    (root / "dataset.yaml").write_text(text)
    return find(root, split)


def test_folders_joined_by_stem(tmp_path):
    write_folder_set(tmp_path)
    source = find(tmp_path)
    assert source.stems == ("a", "b", "c")
    assert source.labels.names == ("road", "car")
    assert set(np.unique(read(source, 0)[1])) == {0, 1, 255}


def test_the_yaml_may_live_elsewhere(tmp_path):
    write_folder_set(tmp_path / "set")
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / "x.yaml"
    (tmp_path / "set" / "dataset.yaml").rename(file)
    assert len(find(tmp_path / "set", file=file)) == 3
    assert len(catalog.find(Data(name="folder", root=str(tmp_path / "set"), file=str(file)), "val")) == 2


def test_a_list_may_lie_beside_the_yaml(tmp_path):
    write_pairs(tmp_path / "set")
    (tmp_path / "few.yaml").write_text("train: {images: images, masks: masks, list: few.txt}\nclasses: [road, car]")
    (tmp_path / "few.txt").write_text("c\na\n")
    assert set(find(tmp_path / "set", file=tmp_path / "few.yaml").stems) == {"a", "c"}


def test_globs_templates_lists_and_several_places(tmp_path):
    for name in ("a", "b c", "d"):
        write_image(tmp_path / "one" / f"{name}.png")
        write_mask(tmp_path / "one" / f"{name}_mask.png", [0, 1])
    write_image(tmp_path / "two" / "e.jpg")
    write_mask(tmp_path / "one" / "e_mask.png", [0, 1])
    (tmp_path / "train.txt").write_text("b c\n\nd.png extra words\ne\n")
    text = (
        'train: {images: ["one/?.png", "one/b c.png", two], masks: "one/{stem}_mask.png", list: train.txt}\n'
        "classes: [x, y]\n"
    )
    assert described(tmp_path, text).stems == ("b c", "d", "e")


def test_a_folder_or_file_whose_name_looks_like_a_glob_is_itself(tmp_path):
    write_pairs(tmp_path, images="set [1]/why?", masks="set [1]/m*", names=("a", "b"))
    write_image(tmp_path / "c[0].png")
    write_mask(tmp_path / "set [1]" / "m*" / "c[0].png", [0, 1])
    text = 'train: {images: ["set [1]/why?", "c[0].png"], masks: "set [1]/m*"}\nclasses: [x, y]\n'
    assert described(tmp_path, text).stems == ("a", "b", "c[0]")


def test_a_glob_leaves_out_the_files_a_folder_leaves_out(tmp_path):
    write_pairs(tmp_path)
    for place in ("images", "masks"):
        (tmp_path / place / "._a.png").write_bytes(b"a resource fork of macOS")
    assert described(tmp_path, "train: {images: images, masks: masks}\nclasses: [x, y]").stems == ("a", "b", "c")
    text = "train: {images: 'images/*.png', masks: 'masks/*.png'}\nclasses: [x, y]"
    assert described(tmp_path, text).stems == ("a", "b", "c")


def test_a_listed_image_that_is_missing_is_a_fault(tmp_path):
    write_pairs(tmp_path)
    (tmp_path / "train.txt").write_text("a\nzzz\n")
    with pytest.raises(DataError, match="zzz: listed, but there is no image"):
        described(tmp_path, "train: {images: images, masks: masks, list: train.txt}\nclasses: [x, y]")


def test_a_split_without_masks_is_all_ignored(tmp_path):
    write_pairs(tmp_path)
    source = described(tmp_path, "test: {images: images}\nclasses: [x, y]", "test")
    assert source.masks == (None, None, None)
    assert (SegmentationDataset(source)[0]["label"] == 255).all()


def test_ids_need_not_be_consecutive(tmp_path):
    write_pairs(tmp_path, values=(0, 255))
    source = described(tmp_path, "train: {images: images, masks: masks}\nclasses: {0: back, 255: front}")
    assert set(np.unique(read(source, 0)[1])) == {0, 1}


@pytest.mark.parametrize("ignore", ["0", "[0]"])
def test_one_ignored_id_needs_no_list_even_0(tmp_path, ignore):
    write_pairs(tmp_path, values=(0, 1, 2))
    source = described(tmp_path, f"train: {{images: images, masks: masks}}\nclasses: {{1: x, 2: y}}\nignore: {ignore}")
    assert set(np.unique(read(source, 0)[1])) == {0, 1, 255}
    with pytest.raises(DataError, match=r"\[0\] are classes and ignored at once"):
        described(tmp_path, f"classes: [void, x]\nignore: {ignore}")


def test_label_map_merges_and_is_complete(tmp_path):
    write_pairs(tmp_path, values=(3, 4, 5, 9))
    base = "train: {images: images, masks: masks}\nclasses: {0: x, 1: y}\nlabel_map: {3: 0, 4: 0, 5: 1}\n"
    source = described(tmp_path, base + "ignore: [9]")
    assert set(np.unique(read(source, 0)[1])) == {0, 1, 255}
    with pytest.raises(DataError, match=r"unknown label value 9 \(\d+ px\), but expected are 3-5, 255"):
        read(described(tmp_path, base), 0)


def test_label_map_may_use_the_id_that_is_ignored_where_nothing_is_said(tmp_path):
    write_pairs(tmp_path, values=(0, 255, 7))
    base = "train: {images: images, masks: masks}\nclasses: {0: bg, 1: fg}\n"
    source = described(tmp_path, base + "label_map: {0: 0, 255: 1, 7: 255}")
    assert read(source, 0)[1][0, :3].tolist() == [0, 1, 255]
    with pytest.raises(DataError, match=r"\[255\] are in `label_map` and in `ignore`"):
        described(tmp_path, base + "label_map: {0: 0, 255: 1}\nignore: [255]")


def test_rgb_masks_through_the_palette(tmp_path):
    write_image(tmp_path / "images" / "a.png", (1, 4))
    (tmp_path / "masks").mkdir()
    colours = np.array([[[0, 0, 142], [128, 64, 128], [0, 0, 0], [1, 1, 1]]], dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "masks" / "a.png")
    base = "train: {images: images, masks: masks}\nclasses: {0: road, 1: car}\n"
    palette = 'palette: {0: [128, 64, 128], 1: "#00008e", 255: [[0, 0, 0], [1, 1, 1]]}'
    source = described(tmp_path, base + palette)
    assert read(source, 0)[1].tolist() == [[1, 0, 255, 255]]
    assert source.labels.palette == ((128, 64, 128), (0, 0, 142))
    with pytest.raises(DataError, match=r"\[1, 1, 1\] \(1 px\)"):
        read(described(tmp_path, base + 'palette: {0: [128, 64, 128], 1: "#00008e", 255: [0, 0, 0]}'), 0)


def test_more_than_255_classes_need_another_ignore_index(tmp_path):
    write_image(tmp_path / "images" / "a.png", (1, 3))
    write_mask(tmp_path / "masks" / "a.png", [[0, 299, 65535]], dtype=np.uint16)
    names = ", ".join(f"c{i}" for i in range(300))
    source = described(tmp_path, f"train: {{images: images, masks: masks}}\nclasses: [{names}]")
    assert source.labels.ignore_index == 65535
    assert SegmentationDataset(source)[0]["label"].tolist() == [[0, 299, 65535]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as YAML"),
        ("a: [1, 2]", "needs `classes`"),
        ("classes: {x: 1}", "maps ids"),
        ("classes: {-1: x}", "maps ids"),
        ("clases: {0: x}\nclasses: [x]", "unknown key 'clases'"),
        ("train: images\nclasses: [x, y]", "unknown key 'train'"),
        ("train: {images: images, mask: masks}\nclasses: [x, y]", r"unknown keys \['mask'\]"),
        ("train: {masks: masks}\nclasses: [x, y]", "needs {images"),
        ("train: {images: 3}\nclasses: [x, y]", "a place is a folder"),
        ("train: {images: nowhere, masks: masks}\nclasses: [x, y]", "nowhere: no such file or directory"),
        ("train: {images: '*.gif', masks: masks}\nclasses: [x, y]", "no images in"),
        ("train: {images: 'i/**x'}\nclasses: [x, y]", r"dataset\.yaml: `images`: 'i/\*\*x' is no glob"),
        ("train: {images: images, masks: 'm**'}\nclasses: [x, y]", "`masks`: 'm[*][*]' is no glob"),
        ("train: {images: 'i/{stem}.png'}\nclasses: [x, y]", "only works in `masks`"),
        ("train: {images: images, masks: masks, list: no.txt}\nclasses: [x, y]", r"no\.txt: cannot be read as a list"),
        ("val: {images: images}\nclasses: [x, y]", "no split 'train'; it describes val"),
        ("classes: {0: x, 5: y}\nignore: [5]", "classes and ignored at once"),
        ("classes: [x, y]\nignore: [many]", "`ignore` is a list of ids"),
        ("classes: [x, y]\nlabel_map: {0: 7}", "point.* no classes: {0: 7}"),
        ("classes: [x, y]\nlabel_map: {0: [0], 255: 1}", r"dataset\.yaml: `label_map` maps ids .* one each"),
        ("classes: [x, y]\nlabel_map: {9: 1}\nignore: [9]", "in `label_map` and in `ignore`"),
        ("classes: [no, x]", r"dataset\.yaml: `classes`: YAML reads a bare no, off or false .* in quotes"),
        ("classes: {0: x, 1: yes}", "YAML reads a bare yes, on or true"),
        ("classes: [x, y]\npalette: [[1, 2, 3]]", r"dataset\.yaml: `palette` as a list .* 2 classes, given 1"),
        ("classes: [x, y]\npalette: ['#000000', '#000001', '#000002']", "there are 2 classes, given 3"),
        ("classes: [x, y]\npalette: {0: [1, 2]}", "a colour is"),
        ("classes: [x, y]\npalette: {0: [1, 2, 3], 1: [1, 2, 3]}", "to ids 0 and 1"),
        ("classes: [x, y]\npalette: {7: [1, 2, 3]}", "neither classes nor ignored"),
        ("classes: &a [x, *a]", "aliases are not allowed"),
        ("classes: !!python/object/apply:os.getcwd []", "not readable as YAML"),
    ],
)
def test_a_contradiction_is_a_sentence_that_names_the_file(tmp_path, text, message):
    write_pairs(tmp_path)
    with pytest.raises(DataError, match=message):
        described(tmp_path, text)


def test_a_missing_yaml_says_what_to_write(tmp_path, monkeypatch):
    monkeypatch.delenv("PROTOSEG_FOLDER", raising=False)
    with pytest.raises(DataError, match=r"dataset\.yaml: no such file; describe the data set there"):
        find(tmp_path)
    with pytest.raises(DataError, match=r"set data\.root, data\.file"):
        catalog.find(Data(name="folder"), "train")
