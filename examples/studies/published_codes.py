"""Compares published codes for saved tensors: bytes, error and bias of the gradient of four networks.

    python examples/studies/published_codes.py [--models gpt,vit] [--draws 8] [--minutes 5] [--markdown]
    python examples/studies/published_codes.py --data cifar-10-batches-bin
    python examples/studies/published_codes.py --show --figure docs/figures/published_codes.png
    python examples/studies/published_codes.py --times

Each code stores the inputs of layers and of norms in about 1, 2 or 4 bits for each element. All other
tensors are the same for all codes: factors of the passing gradient take 4 bits (dithered), query and key
take 8 bits. Tensors that a code leaves to its fallback take rotated codes of 1, 2 or 4 bits. Two rows,
"all alike", store every float tensor with the code, as their authors do. Codes are compared by the bytes
of the whole network, which are true bytes of live tensors.

For the gradient of all parameters as one vector, g is exact, g~ is rounded, and m is the mean of g~:

    error = E |g~ - g|^2 / |g|^2,
    bias  = |m - g| / |g|, without what is due to the number of draws.

The networks are untrained; images are smooth noise. With ``--data``, the folder of the binary version of
CIFAR-10, two networks are also trained for a moment and measured at 2 bits. The script appends each
result at once to a file. A stopped run continues where it stopped. The study takes about 15 minutes on
one core.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from gradient_quality import prepare, saved
from published_codes_networks import MODELS, Task, trained_models
from published_codes_report import Result, draw, load, show
from published_codes_ways import BITS, CODES, SAME, UNUSED
from tables import show_table

from brevitas_bp import OpAware, QuantBackwardWrapper
from brevitas_bp.allocate import measure_gradient_error

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from timing import best_of

Models = dict[str, Callable[[], Task]]


def measure(models: Models, name: str, code: str, bits: int, draws: int) -> Result | None:
    """Measures one network with one code; None if the code has no such width."""
    options = CODES[code](bits)
    if options is None:
        return None
    net, _, run = prepare(name, models)
    model = QuantBackwardWrapper(net, **{"policy": OpAware(**SAME), **options})
    report = saved(model, run)
    total = measure_gradient_error(model, run, draws=draws).total
    error = (total.variance + max(total.offset, 0.0)) / total.size**2
    return Result(
        name, code, bits, draws, report.stored_bytes, report.exact_bytes, error, total.bias,
        total.signal)


def measure_all(path: Path, models: Models, draws: int, minutes: float) -> bool:
    """Measures what is missing, for so many minutes; returns whether all is measured."""
    end, known = time.monotonic() + 60 * minutes, load(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in models:
        for code in CODES:
            for bits in (2,) if name.endswith("trained") else BITS:
                if (name, code, bits) in known or code in UNUSED.get(name.split(",")[0], ()):
                    continue
                if time.monotonic() > end:
                    return False
                result = measure(models, name, code, bits, draws)
                if result is not None:
                    print(result, file=sys.stderr, flush=True)
                    with path.open("a") as file:
                        file.write(json.dumps(asdict(result)) + "\n")
    return True


def show_times(markdown: bool) -> None:
    """Prints how long it takes to store and to restore 1M elements [16, 64, 32, 32], in ns each."""
    x, cells = torch.randn(16, 64, 32, 32), []
    for code, options in CODES.items():
        codec = (options(2) or {})["act_quant"].in_rows(x[0].numel(), x.shape[-1])
        packed = codec.encode(x, seed=0)
        if code.endswith("all alike"):
            continue
        there = best_of(lambda codec=codec: codec.encode(x, seed=0))
        back = best_of(packed.decode)
        cells.append([
            code, f"{packed.nbytes * 8 / x.numel():.2f}", f"{there / x.numel() * 1e9:.1f}",
            f"{back / x.numel() * 1e9:.1f}"])
    show_table(["code", "bits", "encode, ns", "decode, ns"], cells, markdown)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--data", type=Path, help="measure trained networks too")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--times", action="store_true", help="measure times of codecs only")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/published_codes.jsonl"))
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    if unknown := set(options.models.split(",")) - set(MODELS):
        parser.error(f"unknown models {sorted(unknown)}; expected some of {sorted(MODELS)}")
    models = {name: MODELS[name] for name in options.models.split(",")}
    if options.data is not None:
        models |= trained_models(options.data, options.out.parent)
    if options.times:
        show_times(options.markdown)
        return
    if not options.show and not measure_all(options.out, models, options.draws, options.minutes):
        print("stopped; run again to continue", file=sys.stderr)
    results = load(options.out)
    show(results, options.markdown)
    if options.figure is not None:
        draw(results, list(MODELS), options.figure)


if __name__ == "__main__":
    main()
