"""Wraps every classification model of torchvision, families of timm, and other layers of torch.nn.

    python examples/studies/model_coverage.py [--only resnet] [--out runs/coverage.json] [--markdown]

For each model, the table says whether the forward pass is bit-identical and all gradients are finite,
the ratio of saved bytes at the default policy (2 bits, bucket 256, bfloat16 metadata), and the
operations left exact because they have no rule. The script appends each result at once. A stopped run
continues where it stopped. The study takes about 15 minutes.
"""

import argparse
import functools
import gc
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from tables import show_table
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper, track_saved_memory

sys.path.insert(0, str(Path(__file__).parents[1] / "efficientnet_v2"))
from vision import import_torchvision

#: Image size that a model needs, in pixels; 64 for models not listed.
SIZES = {"inception_v3": 299, "vit": 224, "maxvit": 224, "alexnet": 80}

#: Models of timm, if it is installed. Models built for one image size get that size, others 64 pixels.
TIMM = [
    "beit_base_patch16_224", "cait_xxs24_224", "coatnet_nano_rw_224", "convnext_atto",
    "convnextv2_atto", "davit_tiny", "deit3_small_patch16_224", "dm_nfnet_f0", "edgenext_xx_small",
    "efficientnetv2_rw_t", "efficientvit_b0", "eva02_tiny_patch14_224", "fastvit_t8",
    "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_100", "hiera_tiny_224", "hrnet_w18_small",
    "inception_next_atto", "levit_128s", "maxvit_nano_rw_256", "mixer_s16_224", "mixer_s32_224",
    "mobilenetv3_small_050", "mobilenetv3_small_100", "mobilenetv4_conv_small", "mobilevit_xxs",
    "nf_regnet_b0", "nf_resnet50", "nfnet_l0", "poolformer_s12", "pvt_v2_b0", "regnetx_002",
    "regnety_002", "repvit_m0_9", "resmlp_12_224", "resnest14d", "resnet10t", "resnetv2_50x1_bit",
    "rexnet_100", "seresnet18", "starnet_s1", "swin_s3_tiny_224", "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256", "tiny_vit_5m_224", "vit_tiny_patch16_224", "volo_d1_224",
    "xcit_nano_12_p16_224"]


@dataclass(frozen=True)
class Row:
    """Measurements of one model."""

    model: str
    forward: str
    gradients: str
    exact_mib: float
    ratio: float
    unknown: list[str]


def first_tensor(output: Any) -> Tensor:
    """Returns the tensor to differentiate; some outputs are tuples."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def measure(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> Row:
    """Runs a model plain and wrapped, from the same buffers and random state."""
    buffers = {key: value.clone() for key, value in module.named_buffers()}
    torch.manual_seed(1)
    plain = first_tensor(module(*inputs)).detach()
    after = {key: value.clone() for key, value in module.named_buffers()}
    for key, value in module.named_buffers():
        value.copy_(buffers[key])
    model = QuantBackwardWrapper(module, bucket_size=256, metadata_dtype=torch.bfloat16, seed=0)
    torch.manual_seed(1)
    with track_saved_memory(model) as report:
        output = first_tensor(model(*inputs))
    same = torch.equal(output, plain) and all(
        torch.equal(value, after[key]) for key, value in module.named_buffers())
    output.square().mean().backward()
    finite = all(
        p.grad is None or bool(p.grad.isfinite().all()) for p in module.parameters())
    return Row(
        name, "identical" if same else "DIFFERENT", "finite" if finite else "NOT FINITE",
        round(report.exact_bytes / 2**20, 2), round(report.ratio, 2), report.unknown_operations)


def layers() -> dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]]:
    """Returns modules of torch.nn that no classification model has."""
    words = torch.randn(8, 32, 64)
    return {
        "nn.RNN": lambda: (nn.RNN(64, 64, 2, batch_first=True), (words,)),
        "nn.LSTM": lambda: (nn.LSTM(64, 64, 2, batch_first=True), (words,)),
        "nn.GRU": lambda: (nn.GRU(64, 64, 2, batch_first=True), (words,)),
        "nn.Transformer": lambda: (
            nn.Transformer(64, 4, 2, 2, 256, batch_first=True), (words, words)),
        "nn.TransformerEncoderLayer": lambda: (
            nn.TransformerEncoderLayer(64, 4, 256, batch_first=True), (words,)),
        "nn.TransformerEncoderLayer, gelu, no dropout": lambda: (
            nn.TransformerEncoderLayer(64, 4, 256, 0.0, "gelu", batch_first=True), (words,)),
        "nn.MultiheadAttention with weights": lambda: (
            nn.MultiheadAttention(64, 4, batch_first=True), (words, words, words)),
        "1-d convolutions": lambda: (nn.Sequential(
            nn.Conv1d(64, 64, 3), nn.BatchNorm1d(64), nn.ReLU(), nn.MaxPool1d(2),
            nn.ConvTranspose1d(64, 32, 3)), (words.transpose(1, 2),)),
        "3-d convolutions": lambda: (nn.Sequential(
            nn.Conv3d(4, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2),
            nn.ConvTranspose3d(8, 4, 3)), (torch.randn(2, 4, 16, 16, 16),)),
        "2-d transposed convolutions": lambda: (nn.Sequential(
            nn.ConvTranspose2d(16, 16, 4, 2), nn.InstanceNorm2d(16), nn.LeakyReLU(),
            nn.ConvTranspose2d(16, 3, 4, 2), nn.Tanh()), (torch.randn(4, 16, 16, 16),)),
    }


def builders(
        batch: int, pixels: int | None) -> dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]]:
    """Returns name -> builder of a model and its inputs."""
    torchvision = import_torchvision()
    models = import_torchvision("torchvision.models")
    found = layers()
    for name in models.list_models(module=torchvision.models):
        size = pixels or next((s for key, s in SIZES.items() if name.startswith(key)), 64)

        def build(name: str = name, size: int = size) -> tuple[nn.Module, tuple[Any, ...]]:
            options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            return models.get_model(name, weights=None, **options), (torch.randn(batch, 3, size, size),)

        found[name] = build
    return found | timm_builders(batch, pixels)


def timm_builders(
        batch: int, pixels: int | None) -> dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]]:
    """Returns :func:`builders` for timm, if installed. Runs after torchvision, which timm imports."""
    if importlib.util.find_spec("timm") is None:
        return {}
    timm = importlib.import_module("timm")

    def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
        module = timm.create_model(name, pretrained=False)
        size = pixels or (
            module.pretrained_cfg["input_size"][-1] if module.pretrained_cfg["fixed_input_size"] else 64)
        return module, (torch.randn(batch, 3, size, size),)

    return {f"timm/{name}": functools.partial(build, name) for name in TIMM}


def load(path: Path) -> dict[str, Row]:
    """Returns rows of earlier runs."""
    if not path.exists():
        return {}
    rows = (Row(**json.loads(line)) for line in path.read_text().splitlines())
    return {row.model: row for row in rows}


def show(rows: list[Row], markdown: bool) -> None:
    """Prints the table, on the console or as Markdown."""
    titles = ["model", "forward", "gradients", "saved MiB", "ratio", "left exact, no rule"]
    cells = [[
        r.model, r.forward, r.gradients, f"{r.exact_mib:.1f}", f"{r.ratio:.2f}",
        ", ".join(r.unknown) or "-"] for r in rows]
    show_table(titles, cells, markdown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="part of the name")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, help="pixels; by default the least that the model allows")
    parser.add_argument("--out", type=Path, default=Path("runs/coverage.json"))
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = load(options.out)
    found = builders(options.batch, options.size)
    todo = {name: build for name, build in found.items() if options.only in name}
    for name, build in track(todo.items(), console=Console(stderr=True)):
        if name in rows:
            continue
        torch.manual_seed(0)
        module, inputs = build()
        rows[name] = measure(name, module.train(), inputs)
        del module
        gc.collect()
        with options.out.open("a") as file:
            file.write(json.dumps(asdict(rows[name])) + "\n")
    show([rows[name] for name in todo], options.markdown)


if __name__ == "__main__":
    main()
