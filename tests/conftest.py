import pytest

from protoseg.kernels import clustering_cpu


@pytest.fixture(params=["C", "PyTorch"])
def way(request, monkeypatch):
    """Both ways behind the door: the operators that a C compiler made, and the PyTorch lines without one."""
    if request.param == "PyTorch":
        monkeypatch.setattr(clustering_cpu, "takes", lambda *tensors: False)
    elif not clustering_cpu.available():
        pytest.skip("no C compiler")
    return request.param
