"""What `import protoseg` costs, and what it offers."""

import subprocess
import sys

import pytest

import protoseg


def loaded(code: str) -> set[str]:
    out = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in out.stdout.split()}


def test_importing_the_package_waits_for_no_library():
    assert not loaded("import protoseg; protoseg.__version__; dir(protoseg)") & {"torch", "numpy", "PIL", "lightning"}


def test_the_head_needs_torch_and_nothing_else():
    modules = loaded("from protoseg import PrototypeHead")
    assert "torch" in modules
    assert not modules & {"lightning", "timm", "torchvision", "torchmetrics", "transformers", "PIL", "yaml"}


def test_every_public_name_is_there_and_others_are_not():
    for name in protoseg.__all__:
        assert getattr(protoseg, name) is not None
        assert name in dir(protoseg)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = protoseg.lod
