import pytest

from protoseg.kernels import clustering_cpu, native


@pytest.fixture(params=["C", "PyTorch"])
def way(request, monkeypatch):
    """Both ways behind the door on a CPU: what a C compiler made, and the PyTorch lines without one."""
    if request.param == "PyTorch":
        for module in (clustering_cpu, native):
            monkeypatch.setattr(module, "takes", lambda *tensors: False)
    elif not clustering_cpu.available():
        pytest.skip("no C compiler")
    return request.param
