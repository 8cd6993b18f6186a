"""Whether the prototypes of a class have found looks that nobody told them.

Looks of whole pictures, from a LIST that names a picture and its look in every line, as `dsb2018/test.txt` does:

    python studies/purity.py LIST IMAGES RUN...

Looks of pixels: the classes of a finer description of the same masks, or what generated scenes were painted as:

    python studies/purity.py --root CAMVID --classes studies/data/camvid-four.yaml \\
        --looks studies/data/camvid-trainval.yaml RUN...
    python studies/purity.py --generated RUN...

`--cluster K` puts K centres of k-means in the place of prototypes, fitted after training to each class's embeddings in
the train split: the rival that needs no prototypes in training, for any head that has no norm of its own between
projection and unit length. With looks of pixels only.

Purity of a class: the share of its pixels whose prototype's most frequent look is their own, every look counted alike;
without any knowledge of looks it is one over their number. With looks of pictures every picture counts alike too, and
pixels belong to the class they are given. With looks of pixels a pixel belongs to its true class, and its prototype is
the nearest of that class, at label size: what the model takes it for does not matter.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from protoseg import PrototypeHead
from protoseg.config import Data, UserError
from protoseg.data import catalog, synthetic
from protoseg.data.dataset import read
from protoseg.data.images import read_image
from protoseg.data.transforms import resize_image
from protoseg.engine.looks import chosen_prototypes, count_looks, own_prototypes, purity, similarities
from protoseg.method.similarity import unit
from protoseg.tasks.prediction import Predictor, load
from protoseg.tasks.saved import model_folder, recorded, settings_of

Pictures = Iterable[tuple[Tensor, Tensor, Tensor]]  # image (3, H, W) uint8, label and look (H, W) int64
DRAWN, KEPT = 100, 20_000  # pixels a class of one picture, and of all: what k-means is fitted to


def shares(predictor: Predictor, pictures: list[tuple[Path, int]], looks: int) -> Tensor:
    """(C, K, L): how much of look l is given prototype k of class c, in pictures."""
    C, K = predictor.segmenter.head.prototypes.shape[:2]
    table = torch.zeros(C, K, looks, dtype=torch.float64)
    for file, look in pictures:
        image = resize_image(torch.from_numpy(read_image(file)).permute(2, 0, 1), predictor._sizes)
        chosen = chosen_prototypes(similarities(predictor.segmenter, image)).flatten().cpu()
        table[:, :, look] += torch.bincount(chosen, minlength=C * K).view(C, K) / len(chosen)
    return table


def pixel_shares(predictor: Predictor, pictures: Pictures, looks: int) -> Tensor:
    """(C, K, L): pixels of class c in look l whose nearest prototype of their class is k."""
    head = predictor.segmenter.head
    C, K = head.prototypes.shape[:2]
    table = torch.zeros(C, K, looks, dtype=torch.float64)
    for image, label, look in pictures:
        similarity = similarities(predictor.segmenter, resize_image(image, predictor._sizes)).cpu()
        table += count_looks(own_prototypes(similarity, label, head.align_corners), label, look, (C, K, looks))
    return table


@torch.no_grad()
def embeddings(predictor: Predictor, pictures: Pictures, generator: torch.Generator) -> list[Tensor]:
    """For each class (n, D) unit embeddings of pixels drawn from it, at most `DRAWN` a picture and `KEPT` in all."""
    model = predictor.segmenter
    head = model.head
    found: list[list[Tensor]] = [[] for _ in range(head.num_classes)]
    for image, label, _ in pictures:
        image = resize_image(image, predictor._sizes)
        padded = model._prepare(image[None])
        features = head.projection(model.decoder(model.backbone(padded)))[0]  # D h w
        cells = []
        for axis in (0, 1):
            size = image.shape[1 + axis]
            places = (torch.arange(label.shape[axis]) + 0.5) / label.shape[axis] * size
            cells.append((places * features.shape[1 + axis] / padded.shape[2 + axis]).long())
        for c in label.unique().tolist():
            if 0 <= c < head.num_classes:
                at = (label == c).nonzero()
                rows, columns = at[torch.randperm(len(at), generator=generator)[:DRAWN]].T
                found[c].append(unit(features[:, cells[0][rows], cells[1][columns]].T.float()))
    drawn = [torch.cat(rows) if rows else torch.empty(0, head.embed_dim) for rows in found]
    return [rows[torch.randperm(len(rows), generator=generator)[:KEPT]] for rows in drawn]


def cluster(predictor: Predictor, pictures: Pictures, K: int, seed: int = 0) -> None:
    """Put the centres of each class's embeddings (k-means, started by k-means++) in the place of the head's prototypes.

    Raises:
        UserError: a class has fewer than K pixels; the head has a norm of its own.
    """
    from scipy.cluster.vq import kmeans2

    head = predictor.segmenter.head
    if getattr(head, "projection_norm", "channel") != "channel" or getattr(head, "feature_norm", None) is not None:
        raise UserError("this head has a norm between projection and unit length, which --cluster does not take")
    C, D, void = head.num_classes, head.embed_dim, head.ignore_index
    new = PrototypeHead(D, C, num_prototypes=K, projection="none", ignore_index=void).eval()
    for c, rows in enumerate(embeddings(predictor, pictures, torch.Generator().manual_seed(seed))):
        if len(rows) < K:
            raise UserError(f"{len(rows)} pixels of class {predictor.names[c]} do not make {K} clusters")
        centres, _ = kmeans2(rows.numpy(), K, iter=100, minit="++", rng=seed)
        new.prototypes[c] = unit(torch.from_numpy(centres))
    new.projection = head.projection
    predictor.segmenter.head = new


def finer(classes: Path, looks: Path, root: str, split: str) -> tuple[list[str], list[list[str]], Pictures]:
    """Names of the classes of `classes`, for each the names of the looks, and the pictures of a split.

    Raises:
        UserError: the two descriptions do not name the same pictures.
    """
    coarse, fine = (catalog.find(Data(name="folder", root=root, file=str(file)), split) for file in (classes, looks))
    if coarse.images != fine.images:
        raise UserError(f"{classes} and {looks} name different pictures in {split!r}; give two of the same masks")

    def pictures() -> Pictures:
        for i in range(len(coarse)):
            image, label = read(coarse, i)
            look = torch.from_numpy(read(fine, i)[1])
            yield torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label), look

    return list(coarse.labels.names), [list(fine.labels.names)] * coarse.labels.num_classes, pictures()


def generated(data: Data, split: str) -> tuple[list[str], list[list[str]], Pictures]:
    """The same for scenes that are painted as `data` says."""
    scenes = synthetic.scenes(split, data.length, data.crop_size, data.limit)

    def pictures() -> Pictures:
        for i in range(scenes.count):
            image, label = scenes.item(i)
            yield torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label), torch.from_numpy(scenes.looks(i))

    return list(synthetic.LABELS.names), [list(names) for names in synthetic.LOOKS], pictures()


def of_run(run: Path) -> Data:
    """The data settings of a run.

    Raises:
        UserError: it has no generated scenes.
    """
    data = settings_of(Data, recorded(model_folder(run)).get("data", {}), str(run))
    if data.name != "synthetic":
        raise UserError(f"{run} was not trained on generated scenes but on {data.name}; give --classes and --looks")
    return data


def show(run: Path, classes: Iterable[str], looks: Iterable[list[str]], table: Tensor) -> None:
    """Print purity and what each prototype is made of; prototypes below one percent of their class are left out."""
    purities = [purity(part) for part in table]
    found, chance = torch.tensor(purities).nanmean(0).tolist()
    print(f"{run}: mean purity {found:.3f}, without knowing looks {chance:.3f}")
    for name, names, part, (found, chance) in zip(classes, looks, table, purities):
        print(f"{run} {name}: purity {found:.2f}, without knowing looks {chance:.2f}")
        for k in part.sum(1).argsort(descending=True).tolist():
            if part[k].sum() == 0 or part[k].sum() < 0.01 * part.sum():
                continue
            made_of = zip(names, part[k] / part[k].sum(), part.sum(0))
            mixed = ", ".join(f"{look} {share:.0%}" for look, share, there in made_of if there > 0)
            print(f"  prototype {k}, {part[k].sum() / part.sum():4.0%} of the class: {mixed}")


def measure_pixels(
    run: Path,
    given: Callable[[Path], tuple[list[str], list[list[str]], Pictures]],
    learned: Callable[[Path], Pictures],
    K: int | None,
) -> None:
    """Print one run's purity in the looks of pixels.

    Args:
        given: from a run to the names of the classes, of their looks, and the pictures.
        learned: the pictures of its train split, whose looks nobody looks at.
        K: centres of each class, fitted to those. None: the run's own prototypes.

    Raises:
        UserError: the run has other classes than the pictures.
    """
    predictor = load(run)
    classes, looks, pictures = given(run)
    if list(predictor.names) != classes:
        raise UserError(f"{run} knows the classes {', '.join(predictor.names)}; the pictures have {', '.join(classes)}")
    if K is not None:
        cluster(predictor, learned(run), K)
    show(run, classes, looks, pixel_shares(predictor, pictures, max(map(len, looks))))


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="see the forms below"
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="[LIST IMAGES] RUN...")
    parser.add_argument("--classes", type=Path, help="description of the data set that the runs were trained on")
    parser.add_argument("--looks", type=Path, help="description of the same masks whose classes are the looks")
    parser.add_argument("--root", default="", help="folder of the pictures; default: that of --classes")
    parser.add_argument("--split", default="test")
    parser.add_argument("--generated", action="store_true", help="scenes as each run's own recipe paints them")
    parser.add_argument("--cluster", type=int, metavar="K", help="centres of k-means instead of the run's prototypes")
    arguments = parser.parse_args(words)
    split, root = arguments.split, arguments.root
    if arguments.generated:

        def scenes(run: Path, split: str = split) -> tuple[list[str], list[list[str]], Pictures]:
            return generated(of_run(run), split)

        for run in arguments.paths:
            measure_pixels(run, scenes, lambda run: scenes(run, "train")[2], arguments.cluster)
    elif arguments.classes or arguments.looks:
        if not (arguments.classes and arguments.looks):
            parser.error("--classes and --looks belong together")
        coarse, fine = arguments.classes, arguments.looks
        for run in arguments.paths:
            measure_pixels(
                run,
                lambda _: finer(coarse, fine, root, split),
                lambda _: finer(coarse, coarse, root, "train")[2],
                arguments.cluster,
            )
    else:
        if arguments.cluster:
            parser.error("--cluster goes with --classes and --looks, or with --generated")
        if len(arguments.paths) < 3:
            parser.error("give LIST IMAGES RUN..., or --classes and --looks, or --generated")
        listed, images, *runs = arguments.paths
        lines = [line.split() for line in listed.read_text().splitlines()]
        names = sorted({look for _, look in lines})
        files = {file.stem: file for file in images.iterdir()}
        pictures = [(files[stem], names.index(look)) for stem, look in lines]
        print(f"{len(pictures)} pictures, looks {', '.join(names)}")
        for run in runs:
            predictor = load(run)
            show(run, predictor.names, [names] * len(predictor.names), shares(predictor, pictures, len(names)))


if __name__ == "__main__":
    main()
