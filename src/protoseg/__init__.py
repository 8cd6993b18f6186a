"""Semantic segmentation with prototypes instead of a learned classifier (Zhou et al., CVPR 2022).

    from protoseg import PrototypeHead      # the classifier, for any network; needs torch and nothing else
    predictor = protoseg.load("runs/first/best")
    predictor.predict("street.jpg").overlay().save("street-overlay.png")

Names are resolved on first use (PEP 562): importing the package, and `protoseg --help`, must not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from protoseg.method.head import PrototypeHead
    from protoseg.tasks.prediction import load

__all__ = ["PrototypeHead", "__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "PrototypeHead":
        from protoseg.method.head import PrototypeHead

        return PrototypeHead
    if name == "load":
        from protoseg.tasks.prediction import load

        return load
    raise AttributeError(f"module 'protoseg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
