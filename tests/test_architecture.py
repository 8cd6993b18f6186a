"""Imports go down only (docs/architecture.md)."""

import ast
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "protoseg"
MODEL_LIBRARIES = {
    "torch", "torchvision", "timm", "segmentation_models_pytorch", "transformers", "safetensors", "huggingface_hub",
}  # fmt: skip
DATA_LIBRARIES = {"torch", "torchvision", "numpy", "PIL", "yaml"}
ENGINE_LIBRARIES = {*MODEL_LIBRARIES, *DATA_LIBRARIES, "lightning", "torchmetrics", "scipy"}
HOUSE = {
    "kernels": set(),
    "method": {"kernels"},
    "models": {"method", "config"},
    "data": {"config"},
    "engine": {"models", "data", "method", "config"},
    "tasks": {"engine", "models", "data", "method", "config", "__version__"},
    "config": set(),
    "cli": {"config", "tasks", "__version__"},
    "__init__": {"method", "tasks"},
    "__main__": {"cli"},
}
LIBRARIES = {
    "kernels": {"torch", "triton"},
    "method": {"torch"},
    "models": MODEL_LIBRARIES,
    "data": DATA_LIBRARIES,
    "engine": ENGINE_LIBRARIES,
    "tasks": {*ENGINE_LIBRARIES, "jinja2", "matplotlib"},
    "config": set(),
    "cli": {"jsonargparse", "yaml"},
    "__init__": set(),
    "__main__": set(),
}


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda p: str(p.relative_to(SRC)))
def test_imports_go_down_only(path):
    room = path.relative_to(SRC).parts[0].removesuffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports are absolute"
            bare = node.module == "protoseg"  # from protoseg import x: the room is x
            names = [f"protoseg.{a.name}" for a in node.names] if bare else [node.module or ""]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "protoseg":
                target = rest.split(".")[0]
                assert target in HOUSE[room] or target == room, f"{path}:{node.lineno} {room} may not import {name}"
            else:
                known = top in LIBRARIES[room] or top in sys.stdlib_module_names
                assert known, f"{path}:{node.lineno} {room} may not import {name}"
