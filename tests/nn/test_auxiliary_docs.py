"""What docs/auxiliary.md says: its Python blocks run, and so does data parallelism in one process."""

from pathlib import Path

from tests.test_readme import ROOT, python_blocks, run

DDP = """
import copy, tempfile, torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from brevitas_bp import QuantBackwardWrapper
from brevitas_bp.nn import convert_to_auxiliary_residual, convert_to_auxiliary_sign
from brevitas_bp.quant import RotatedNormal2DynamicActPerBucketFloat

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x):
        return x + self.layer(x).relu()

def gradients(model):
    model(x).square().mean().backward()
    return [p.grad for p in model.parameters()]

dist.init_process_group(
    "gloo", rank=0, world_size=1, init_method=f"file://{tempfile.mkdtemp()}/store")
x = torch.randn(64, 32)
for codec in (None, RotatedNormal2DynamicActPerBucketFloat, "signs"):
    net = nn.Sequential(Residual(), Residual())
    if codec == "signs":
        convert_to_auxiliary_sign(net, ["*"])
    else:
        convert_to_auxiliary_residual(net, [["0", "1"]], layers=["layer"], codec=codec, seed=0)
    expected = gradients(copy.deepcopy(net) if codec is None else net)
    for parameter in net.parameters():
        parameter.grad = None
    for run in {module.run for module in net.modules() if hasattr(module, "run")}:
        run.set_noise_state({"base": 0, "position": 0})
    found = gradients(DistributedDataParallel(QuantBackwardWrapper(net, policy="exact")))
    assert all(torch.equal(a, b) for a, b in zip(found, expected)), codec
dist.destroy_process_group()
"""


def test_the_page_runs(tmp_path: Path) -> None:
    blocks = python_blocks((ROOT / "docs/auxiliary.md").read_text())
    assert len(blocks) > 4
    done = run(blocks, tmp_path)
    assert done.returncode == 0, done.stderr


def test_data_parallelism_in_one_process(tmp_path: Path) -> None:
    done = run([DDP], tmp_path)
    assert done.returncode == 0, done.stderr
