"""Everything that only a GPU can tell, most valuable first, within so many minutes.

    python -m benchmarks.gpu_session --minutes 9 --out FOLDER [--only NAME ...] [--camvid PATH] [--dry-run]

Each item runs in processes of its own and has its own limit; one that fails does not stop the rest, and none is begun
that has no time left. FOLDER gets `summary.json`, written after every item, with all that the benchmarks measured, and
`session.log` with all they said. A second call with the same FOLDER goes on with what the summary does not call done:
first what was not tried, then what failed. `--only` runs these whatever it says.

`--camvid` adds, last, a training from scratch (recipes/camvid-scratch-full.yaml) for the minutes that are left; its
metrics, last checkpoint and best model come into FOLDER as well, and a later call continues it. `--device cpu` is a
plan of toys, to try the session itself. Needs nothing but what it measures: pytest for the tests, tensorboard for
training, jsonargparse for `--camvid`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEPT = 10.0  # seconds at the end for writing what was found
KEPT_OUTPUT = 300_000  # characters of a command's output: the log stays small enough to be carried
LIBRARIES = (
    *("torch", "torchvision", "triton", "timm", "transformers", "lightning", "torchmetrics", "numpy", "PIL", "yaml"),
    *("safetensors", "huggingface_hub", "jinja2", "segmentation_models_pytorch", "jsonargparse", "tensorboard"),
    "pytest",
)

Results = list[Any]  # what each command wrote as JSON, None for nothing


@dataclass(frozen=True)
class Item:
    """One thing to find out.

    Args:
        name: of it.
        seconds: after which it is stopped; it is not begun with less than half of that left.
        commands: what Python is given, side by side; `{json}` is a file for results, `{room}` an empty folder.
        tell: results -> a few words for the table; without, the last lines of the output.
        grace: seconds it gets to end by itself when it is stopped.
        before, after: called with the room before it begins and after it ends.
    """

    name: str
    seconds: float
    commands: tuple[tuple[str, ...], ...]
    tell: Callable[[Results], str] | None = None
    grace: float = 5.0
    before: Callable[[Path], None] | None = None
    after: Callable[[Path], None] | None = None


def module(name: str, *arguments: str | int) -> tuple[str, ...]:
    """A benchmark that writes its results."""
    return ("-m", f"benchmarks.{name}", *map(str, arguments), "--json", "{json}")


def checks(file: str, only: str = "") -> tuple[str, ...]:
    """Warnings are of the versions there, not of the kernels: they are shown and fail nothing."""
    command = ("-m", "pytest", "-p", "no:cacheprovider", "-W", "default", "--tb=short", "--maxfail=6", f"tests/{file}")
    return (*command, "-k", only) if only else command


def plan(device: str) -> list[Item]:
    """What to find out, in order."""
    probe = Item("machine", 60, (("-m", "benchmarks.gpu_session", "--probe", device, "--out", "{json}"),), tell_machine)
    if device == "cpu":
        return [
            probe,
            Item("head", 120, (module("head", "--shape", "C2", "--rounds", 1),), tell_head),
            Item("clustering", 60, (module("clustering", "--shape", "C2", "--rounds", 1),), tell_clustering),
            Item("loading", 60, (loading("cpu", "--half", "--limit", 8, "--batch", 4, "--rounds", 1),), tell_loading),
        ]
    here, full = ("--device", device), ("--full", "--device", device, "--rounds", 10)
    curves = (*here, "--dim", 256, "--pixels", 32_768, "--rounds", 10, "--axis")
    ways = ("tf32", "ieee", "bf16", "mm", "not (tf32 or ieee or bf16 or mm)")
    train = (device, "--way", "resident", "--workers", 4, "--precision", "bf16-mixed", "--steps")
    return [
        probe,
        # Side by side: most of their time is the compiler's.
        Item(
            "kernel tests",
            170,
            (
                checks("kernels/test_gpu.py"),
                checks("kernels/test_triton_segments.py"),
                checks("kernels/test_triton_memory.py"),
                checks("kernels/test_triton_labels.py"),
                checks("kernels/test_resizing.py"),
                checks("kernels/test_triton_cross_entropy.py"),
                checks("kernels/test_triton_head.py"),
                *(checks("kernels/test_triton_similarity.py", way) for way in ways),
                checks("method/test_step_cost.py", "on_a_gpu"),
                checks("data/test_resident.py", "gpu"),
            ),
        ),
        Item("head", 60, (module("head", *full, "--memory", "--shape", "C150", "C19"),), tell_head),
        Item("loading", 60, (loading(device, "--workers", 4, "--rounds", 3, "--each", 20),), tell_loading),
        Item("training", 90, (loading(*train, 400),), tell_loading),
        Item("training, fast", 90, (loading(*train, 400, "--fast"),), tell_loading),
        Item("training, profiled", 90, (loading(*train, 60, "--profile"),), tell_loading),
        Item(
            "ways",
            75,
            (module("gpu", *here, "--shape", "C150", "--way", "off", "mm", "tf32", "bf16"),),
            tell_ways,
        ),
        Item("clustering", 45, (module("clustering", *here, "--shape", "C19", "C150", "C847"),), tell_clustering),
        Item("step", 75, (module("step", *here, "--amp", "--batch", 16, "--rounds", 15, "--memory"),), tell_step),
        Item(
            "inference",
            60,
            (module("inference", *here, "--rounds", 15, "--memory", "--shape", "C19", "C150", "C150-mlp"),),
            tell_inference,
        ),
        Item("training, compiled", 120, (loading(*train, 400, "--compile"),), tell_loading),
        Item("training, compiled, fast", 120, (loading(*train, 400, "--compile", "--fast"),), tell_loading),
        Item(
            "head, other shapes",
            90,
            (module("head", *full, "--memory", "--shape", "C150-up", "C150-D720", "C847", "C19-up"),),
            tell_head,
        ),
        Item("head, TF32", 45, (module("head", *full, "--tf32", "--shape", "C150", "C19", "C150-up"),), tell_head),
        Item("ways, label size", 90, (module("gpu", *here, "--shape", "C150-up", "--side", 128),), tell_ways),
        Item("ways, other shapes", 150, (module("gpu", *here, "--shape", "C19", "C150-D720", "C847"),), tell_ways),
        Item("step, fp32", 75, (module("step", *here, "--batch", 16, "--rounds", 10),), tell_step),
        Item("growth in classes", 90, (module("growth", *curves, "C"),)),
        Item("growth in K and N", 90, (module("growth", *curves, "K", "N"),)),
        Item("clustering up in C", 75, (module("clustering", *here, "--growth"),), tell_clustering),
        Item(
            "clustering, compiled",
            90,
            (module("clustering", *here, "--compiled", "--shape", "C150"),),
            tell_clustering,
        ),
        *(Item(f"blocks, {way}", 60, (blocks(device, way),), tell_blocks) for way in ("mm", "bf16", "tf32")),
        Item(
            "inference, other shapes",
            75,
            (module("inference", *here, "--rounds", 10, "--shape", "C2", "C847"),),
            tell_inference,
        ),
    ]


def loading(device: str, *arguments: str | int) -> tuple[str, ...]:
    return module("loading", "--device", device, *arguments)


def blocks(device: str, way: str) -> tuple[str, ...]:
    return module("gpu", "--device", device, "--blocks", "--seconds", 22, "--shape", "C150", "--way", way)


def camvid(data: str, device: str, folder: Path) -> Item:
    """The recipe from scratch, as far as the time reaches; continued where FOLDER holds its checkpoint."""
    run = "{room}/run"
    command = ("-m", "protoseg", "train", "--config", "recipes/camvid-scratch-full.yaml", "--data.root", data)
    command += ("--out", run, "--resume", "auto", "--checkpoint_minutes", "1", "--log_every", "200")
    command += ("--compile", "true") if device != "cpu" else ("--accelerator", "cpu", "--precision", "32-true")
    brought = {"metrics.csv": "camvid-metrics.csv", "checkpoints/last.ckpt": "camvid-last.ckpt"}
    made = {"config.yaml": "camvid-config.yaml", "best/config.json": "camvid-best.json"}
    made |= {"best/model.safetensors": "camvid-best.safetensors"}

    def before(room: Path) -> None:
        for inside, outside in brought.items():
            if (folder / outside).is_file():
                (room / "run" / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / outside, room / "run" / inside)

    def after(room: Path) -> None:
        for inside, outside in {**brought, **made}.items():
            if (room / "run" / inside).is_file():
                shutil.copyfile(room / "run" / inside, folder / outside)

    return Item("camvid from scratch", math.inf, (command,), grace=30, before=before, after=after)


def tell_machine(results: Results) -> str:
    found = results[0]
    rates = ", ".join(f"{name} {value:.0f}" for name, value in found.get("rates", {}).items())
    missing = f"; missing: {', '.join(found['missing'])}" if found["missing"] else ""
    return f"{found['device']}, torch {found['versions'].get('torch')}; kernels: {found['kernels']}; {rates}{missing}"


def tell_head(results: Results) -> str:
    over = {"release": "release / one pass", "floor": "one pass / floor", "softmax": "one pass / softmax"}
    return "; ".join(
        f"{name} {found['ms']['one pass']:.2f} ms (" + ", ".join(f"{k} {found[v]:.2f}" for k, v in over.items()) + ")"
        for name, found in results[0]["results"].items()
    )


def tell_ways(results: Results) -> str:
    return "; ".join(
        f"{name} ms " + ", ".join(f"{way} {ms:.2f}" for way, ms in found["ms"].items() if ":" not in way)
        for name, found in results[0]["results"].items()
    )


def tell_clustering(results: Results) -> str:
    return "; ".join(
        f"{name} {found['ms']['ours']:.2f} ms, loop {found['class loop over']['ours']:.1f}x"
        for name, found in results[0]["results"].items()
    )


def tell_step(results: Results) -> str:
    found = results[0]["results"]
    ms = ", ".join(f"{name} {value:.1f}" for name, value in found["ms"].items())
    return f"prototype / softmax {found['prototype / softmax']:.3f}; ms {ms}"


def tell_inference(results: Results) -> str:
    names = ("head", "frozen", "frozen to pixels")
    return "; ".join(
        f"{name} over conv: " + ", ".join(f"{k} {found['over conv'][k]:.2f}" for k in names)
        for name, found in results[0]["results"].items()
    )


def tell_loading(results: Results) -> str:
    return ", ".join(f"{k} {v['images_per_second']:.0f} images/s" for k, v in results[0]["results"].items())


def tell_blocks(results: Results) -> str:
    return "; ".join(
        f"{name} {way} {kernel} {best[0]['ms']:.3f} ms"
        for name, ways in results[0]["results"].items()
        for way, kernels in ways.items()
        for kernel, best in kernels.items()
        if best
    )


def run_item(item: Item, seconds: float, log: Path) -> dict[str, Any]:
    """Run it for so long at most. What it said goes to the end of `log`."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        room = Path(place)
        if item.before is not None:
            item.before(room)
        running: list[subprocess.Popen[bytes]] = []
        try:
            for number, command in enumerate(item.commands):
                filled = [part.replace("{json}", f"{place}/{number}.json").replace("{room}", place) for part in command]
                with open(room / f"{number}.txt", "wb") as told:
                    running.append(
                        subprocess.Popen(
                            [sys.executable, *filled], stdout=told, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                            cwd=ROOT, env=environment(), start_new_session=True,
                        )
                    )  # fmt: skip
            late = wait(running, seconds)
            if late:
                end(running, item.grace)
        finally:  # also where this process is told to end
            end(running, 0.0)
        said = [(room / f"{n}.txt").read_text(errors="replace") for n in range(len(running))]
        results = [read(room / f"{n}.json") for n in range(len(running))]
        if item.after is not None:
            item.after(room)
    took, codes = time.monotonic() - begun, [process.returncode for process in running]
    state = "late" if late else "failed" if any(codes) else "done"
    with open(log, "a") as file:
        file.write(f"\n{'=' * 100}\n{item.name}: {state}, {took:.0f} s\n")
        for command, code, text in zip(item.commands, codes, said):
            file.write(f"{'-' * 100}\npython {' '.join(command)}\n-> {code}\n{clipped(text)}\n")
    words = "; ".join(dict.fromkeys(last_line(text) for text in said))
    if state == "done" and item.tell is not None:
        try:
            words = item.tell(results)
        except (KeyError, IndexError, TypeError) as fault:  # a benchmark that writes something else than it did
            words = f"results not understood ({type(fault).__name__}: {fault}); {words}"
    return {"state": state, "seconds": round(took, 1), "codes": codes, "told": words, "results": results}


def environment() -> dict[str, str]:
    """That of a child: the package from this tree, one thread, compiled kernels kept for the next item."""
    kept = {"TRITON_CACHE_DIR": str(Path(tempfile.gettempdir(), "protoseg-triton"))} | dict(os.environ)
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), kept.get("PYTHONPATH", "")]))
    return kept | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


def wait(running: Sequence[subprocess.Popen[bytes]], seconds: float) -> bool:
    """Until all have ended; whether it took too long."""
    until = time.monotonic() + seconds
    while any(process.poll() is None for process in running):
        if time.monotonic() > until:
            return True
        time.sleep(0.05)
    return False


def end(running: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """Ask those that still run to end, with their children, and after so many seconds make them."""
    for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, number)
        wait(running, patience)


def read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def clipped(text: str) -> str:
    if len(text) <= KEPT_OUTPUT:
        return text
    half = KEPT_OUTPUT // 2
    return f"{text[:half]}\n... {len(text) - KEPT_OUTPUT} characters left out ...\n{text[-half:]}"


def last_line(text: str) -> str:
    lines = [line.strip(" =") for line in re.split(r"[\r\n]", text) if line.strip(" =")]
    return lines[-1][:160] if lines else "said nothing"


def run(items: Sequence[Item], folder: Path, minutes: float, *, again: bool = False) -> dict[str, Any]:
    """Run what is not done yet, in order; what was tried before comes after what was not.

    Args:
        again: run what is done as well.

    Returns:
        The summary.
    """
    until = time.monotonic() + 60 * minutes - KEPT
    folder.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = read(folder / "summary.json") or {"items": {}}
    known = summary["items"]
    left = [item for item in items if again or known.get(item.name, {}).get("state") != "done"]
    for item in sorted(left, key=lambda item: item.name in known):
        limit = min(item.seconds, until - time.monotonic() - item.grace)
        if limit < min(item.seconds / 2, 60):
            continue  # a shorter one may still fit
        print(f"{item.name}: at most {limit:.0f} s ...", flush=True)
        known[item.name] = found = run_item(item, limit, folder / "session.log")
        print(f"  {found['state']} after {found['seconds']:.0f} s: {found['told']}", flush=True)
        beside = folder / "summary.json.tmp"
        beside.write_text(json.dumps(summary, indent=1) + "\n")
        beside.replace(folder / "summary.json")
    return summary


def table(items: Sequence[Item], summary: dict[str, Any]) -> str:
    width = max((len(item.name) for item in items), default=0)
    rows = []
    for item in items:
        found = summary["items"].get(item.name, {"state": "not yet", "seconds": 0.0, "told": ""})
        rows.append(f"{item.name:{width}}  {found['state']:7}  {found['seconds']:4.0f} s  {found['told'][:300]}")
    return "\n".join(rows)


def probe(device: str) -> dict[str, Any]:
    """What is here, whether the kernels can be launched, and what the device does at best."""
    import importlib.util
    import logging
    import platform
    from importlib import metadata

    import torch

    from protoseg.kernels import gpu

    reasons: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: reasons.append(record.getMessage())
    logging.getLogger("protoseg.kernels.gpu").setLevel(logging.INFO)
    logging.getLogger("protoseg.kernels.gpu").addHandler(handler)
    there = torch.device(device) if device == "cpu" else torch.device(device, 0)
    way = gpu.way(there, torch.float32)
    named = {"PIL": "pillow", "yaml": "pyyaml"}
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "compiler": shutil.which("gcc") or shutil.which("cc"),
        "versions": {n: metadata.version(named.get(n, n)) for n in LIBRARIES if n not in missing},
        "missing": missing,
        "kernels": way or f"none ({'; '.join(reasons) or 'no GPU asked for'})",
    }
    if device == "cpu":
        return found
    properties = torch.cuda.get_device_properties(there)
    found |= {
        "device": properties.name,
        "GiB": round(properties.total_memory / 2**30, 1),
        "free GiB": round(torch.cuda.mem_get_info(there)[0] / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "rates": rates(there),
    }
    return found


def rates(device: Any) -> dict[str, float]:
    """TFLOP/s of a large product in three precisions, GB/s of a copy, microseconds of a small operation."""
    import torch

    def seconds(step: Callable[[], object], times: int) -> float:
        step()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    side, found = 8192, {}
    a = torch.randn(side, side, device=device)
    half = a.bfloat16()
    for name, precision, matrix in (("fp32", "highest", a), ("TF32", "high", a), ("bf16", "highest", half)):
        torch.set_float32_matmul_precision(precision)
        found[f"{name} TFLOP/s"] = 2e-12 * side**3 / seconds(lambda matrix=matrix: matrix @ matrix, 10)
    torch.set_float32_matmul_precision("highest")
    other = torch.empty_like(a)
    found["copy GB/s"] = 2e-9 * a.numel() * 4 / seconds(lambda: other.copy_(a), 20)
    small = a[:1, :16].clone()
    found["us an operation"] = 1e6 * seconds(lambda: small.add_(1), 2000)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="after which it has ended")
    parser.add_argument("--out", type=Path, help="folder of the summary, of this call and those before")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these items, done or not")
    parser.add_argument("--camvid", default="", help="CamVid's folder, for loading and a training with the time left")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    parser.add_argument("--probe", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.out is None:
        parser.error("--out FOLDER is needed")
    if arguments.probe:
        found = probe(arguments.probe)
        arguments.out.write_text(json.dumps(found, indent=1))
        print(json.dumps(found, indent=1))
        return 0
    items = plan(arguments.device)
    if arguments.camvid:
        data = str(Path(arguments.camvid).resolve())
        os.environ["PROTOSEG_CAMVID"] = data
        items.append(camvid(data, arguments.device, arguments.out.resolve()))
    if arguments.only is not None:
        unknown = set(arguments.only) - {item.name for item in items}
        if unknown:
            parser.error(f"no item {', '.join(sorted(unknown))}; there are {', '.join(item.name for item in items)}")
        items = [item for item in items if item.name in arguments.only]
    if arguments.dry_run:
        for item in items:
            print(f"{item.name}: at most {item.seconds:.0f} s")
            for command in item.commands:
                print(f"  python {' '.join(command)}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    summary = run(items, arguments.out, arguments.minutes, again=arguments.only is not None)
    print(f"\n{table(items, summary)}")
    return int(any(summary["items"].get(item.name, {}).get("state") == "failed" for item in items))


if __name__ == "__main__":
    sys.exit(main())
