import pytest

from protoseg.kernels import clustering, clustering_cpu, native


@pytest.fixture(params=["C", "PyTorch"])
def way(request, monkeypatch):
    """Both ways behind the door on a CPU: what a C compiler made, and the PyTorch lines without one.

    `PyTorch on a GPU`, where a test names it: those lines with sums as a GPU takes them without Triton, in parts of
    few rows.
    """
    if request.param.startswith("PyTorch"):
        for module in (clustering_cpu, native):
            monkeypatch.setattr(module, "takes", lambda *tensors: False)
        if request.param != "PyTorch":
            monkeypatch.setattr(clustering, "adds_atomically", lambda device: True)
            monkeypatch.setattr(clustering, "PART", 3)
    elif not clustering_cpu.available():
        pytest.skip("no C compiler")
    return request.param
