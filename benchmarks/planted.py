"""How soon, and whether, each rule finds sub-clusters that were planted.

    python -m benchmarks.planted [--steps 1000] [--seeds 3] [--json out.json]

Every class has K planted centres (pairwise cosine 0.74). Fixed features, so this measures clustering and momentum
alone, not training. Purity: share of pixels whose prototype's majority cluster is their own. A collapsed memory shows a
pairwise cosine of 1 where the truth is 0.74.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch

from oracles.default import mean_pairwise_cosine, planted_batch, planted_centres, purity
from protoseg.method.head import PrototypeHead

CLASSES, K, D, COSINE, NOISE = 4, 10, 64, 0.74, 0.3
REPORT = (1, 20, 100, 300, 1000, 3000)
MEANS: dict[str, Any] = {"preset": "paper"}
DATA: dict[str, Any] = {"start": "data"}
RULES: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": MEANS,
    "means, 0.99": MEANS | {"momentum": 0.99},
    "means, random start, 0.99": MEANS | {"start": "random", "momentum": 0.99},
    "means, data start, 0.99": MEANS | DATA | {"momentum": 0.99},
    "means, data start, bias-corrected, 0.99": MEANS | DATA | {"momentum_rule": "bias_corrected", "momentum": 0.99},
    "means, data start, bias-corrected": MEANS | DATA | {"momentum_rule": "bias_corrected"},
    "means, data start, count-aware, 0.99": MEANS | DATA | {"momentum_rule": "count_aware", "momentum": 0.99},
    "means, nearest (no balance), 0.99": MEANS | {"assignment": "nearest", "momentum": 0.99},
    "means, nearest, data start, 0.99": MEANS | DATA | {"assignment": "nearest", "momentum": 0.99},
    "reference_fixed": {"preset": "reference_fixed"},
    "reference": {"preset": "reference"},
}


def curve(named: dict[str, Any], steps: int, seed: int) -> dict[int, tuple[float, float]]:
    """step -> (purity, mean pairwise cosine of the prototypes)."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    centres = planted_centres(CLASSES, K, D, COSINE, generator)
    head = PrototypeHead(D, CLASSES, num_prototypes=K, projection="none", **named)
    points = {}
    for step in range(1, steps + 1):
        batch = planted_batch(centres, (2, 25, 40), NOISE, generator)
        with torch.no_grad():
            losses = head.losses(batch.features, batch.labels)
        head.update(losses)
        if step in REPORT:
            found = purity(losses.assignment, batch.cluster, CLASSES * K)
            points[step] = (found, mean_pairwise_cosine(head.prototypes))
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    shown = [step for step in REPORT if step <= arguments.steps]
    print(f"purity / pairwise cosine, mean of {arguments.seeds} seeds; truth 1.00 / {COSINE}")
    print("| rule | " + " | ".join(f"step {step}" for step in shown) + " |")
    print("|---|" + "---|" * len(shown))
    results = {}
    for name, named in RULES.items():
        curves = [curve(named, arguments.steps, seed) for seed in range(arguments.seeds)]
        results[name] = {s: [statistics.mean(c[s][i] for c in curves) for i in (0, 1)] for s in shown}
        print(
            f"| {name} | " + " | ".join("{:.3f} / {:.3f}".format(*results[name][s]) for s in shown) + " |", flush=True
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"steps": arguments.steps, "seeds": arguments.seeds, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
