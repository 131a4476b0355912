"""Makes the example scripts importable: they import each other as plain modules, as when run."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES / "efficientnet_v2"))
