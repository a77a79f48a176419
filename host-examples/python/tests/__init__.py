"""Run with `python -m unittest` in the folder above. The demo's modules are scripts' neighbours, so their folder joins the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
