"""Measurements; each is a module with a command line. Baselines and generators come from `tests/oracles`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
