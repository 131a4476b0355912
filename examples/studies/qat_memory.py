"""Bytes that quantization-aware training saves for backward: Brevitas' layers, plain float, and wrapped.

    python examples/studies/qat_memory.py [--batch 32]

Measures a small CIFAR network with 4-bit weights and activations. Expect 78.3 MiB for QAT, 38.4 MiB for
the network in float, and 7.1 MiB for wrapped QAT.
"""

import argparse

import brevitas.nn as qnn
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from brevitas_bp import QuantBackwardWrapper, track_saved_memory

WIDTHS = (32, 64, 64, 128)


def network(quantized: bool) -> nn.Module:
    """Builds four convolutions and a classifier, fake-quantized or not."""
    layers: list[nn.Module] = [qnn.QuantIdentity(bit_width=8)] if quantized else []
    channels = 3
    for i, width in enumerate(WIDTHS):
        layers.append(
            qnn.QuantConv2d(channels, width, 3, padding=1, weight_bit_width=4, bias=False)
            if quantized else nn.Conv2d(channels, width, 3, padding=1, bias=False))
        layers.append(nn.BatchNorm2d(width))
        layers.append(qnn.QuantReLU(bit_width=4) if quantized else nn.ReLU())
        if i:
            layers.append(nn.MaxPool2d(2))
        channels = width
    head = qnn.QuantLinear(channels, 10, True, weight_bit_width=4) if quantized else nn.Linear(
        channels, 10)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, 32, 32)
    qat = network(True)
    models = {
        "float": network(False), "QAT": qat,
        "QAT, wrapped, 2 bits": QuantBackwardWrapper(
            qat, bucket_size=256, metadata_dtype=torch.bfloat16)}
    table = Table("network", "saved MiB")
    for name, model in models.items():
        with track_saved_memory(model) as report:
            loss = model(images).logsumexp(1).mean()
        del loss
        table.add_row(name, f"{report.stored_bytes / 2**20:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
