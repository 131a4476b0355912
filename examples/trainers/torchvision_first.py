"""Makes torchvision importable. Import this module before Lightning, Transformers, PEFT and timm."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "efficientnet_v2"))
from vision import import_torchvision

import_torchvision()
