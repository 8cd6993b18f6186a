"""Whether the prototypes of a class have found looks that nobody told them: python studies/purity.py LIST IMAGES RUN...

LIST names a picture and its look in every line, as `dsb2018/test.txt` does. Purity of a class: the share of its pixels
whose prototype's most frequent look is their own, every picture counted alike and every look too; without any
knowledge of looks it is one over their number. Pixels belong to the class they are given, not to the true one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from protoseg.data.images import read_image
from protoseg.data.transforms import resize_image
from protoseg.engine.looks import chosen_prototypes, similarities
from protoseg.tasks.prediction import load


def shares(run: Path, pictures: list[tuple[Path, int]], looks: int) -> tuple[tuple[str, ...], Tensor]:
    """Names of the classes, and (C, K, L): how much of look l is given prototype k of class c, in pictures."""
    predictor = load(run)
    C, K = predictor.segmenter.head.prototypes.shape[:2]
    table = torch.zeros(C, K, looks, dtype=torch.float64)
    for file, look in pictures:
        image = resize_image(torch.from_numpy(read_image(file)).permute(2, 0, 1), predictor._sizes)
        chosen = chosen_prototypes(similarities(predictor.segmenter, image)).flatten()
        table[:, :, look] += torch.bincount(chosen, minlength=C * K).view(C, K) / len(chosen)
    return predictor.names, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    arguments = parser.parse_args()
    lines = [line.split() for line in arguments.list.read_text().splitlines()]
    names = sorted({look for _, look in lines})
    files = {file.stem: file for file in arguments.images.iterdir()}
    pictures = [(files[stem], names.index(look)) for stem, look in lines]
    print(f"{len(pictures)} pictures, looks {', '.join(names)}: purity without knowing them {1 / len(names):.2f}")
    for run in arguments.runs:
        classes, table = shares(run, pictures, len(names))
        for name, part in zip(classes, table):
            alike = part / part.sum(0)  # K L, every look weighs 1
            purity = alike.max(1).values.sum() / len(names)
            print(f"{run} {name}: purity {purity:.2f}")
            for k in part.sum(1).argsort(descending=True).tolist():
                if part[k].sum() < 0.01 * part.sum():
                    continue
                mixed = ", ".join(f"{look} {share:.0%}" for look, share in zip(names, part[k] / part[k].sum()))
                print(f"  prototype {k}, {part[k].sum() / part.sum():4.0%} of the class: {mixed}")


if __name__ == "__main__":
    main()
