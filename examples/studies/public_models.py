"""Published models of transformers, timm and torchvision, wrapped: errors of the gradient, and bytes.

    python examples/studies/public_models.py --only '/(bert|llama|t5|vit|resnet18)$'    # a minute
    python examples/studies/public_models.py [--sources timm] [--minutes 60] [--markdown]
    python examples/studies/public_models.py --compare runs/public_models_before.jsonl

Every model type of transformers with a base class (tiny configurations), the smallest model of each
family of timm, and all models of torchvision for images and clips, up to 100 million parameters. In
training mode, dropout on, weights random; nothing is downloaded. Of each: are outputs, buffers and
random state equal to those of the plain model, and all gradients too under ``policy="exact"``; the error
``|g~ - g| / |g|`` of the whole gradient, of one draw at the default policy with 2 and with 8 bits; and
the bytes saved for backward, exact and at 2 bits.

Each model runs in a process of its own, with a time limit. Results are appended as they come; a run
that was stopped goes on where it was. Models without figures are kept too, with the reason: remove
their lines to try them again. ``--minutes 0`` measures nothing and prints what there is.

Expected of the first line: nothing differs; errors below 1.2 at 2 bits and below 0.02 at 8. Everything
takes some two hours on one core. Detectors that need the compiled operators of torchvision (Faster,
Mask and Keypoint R-CNN) count as "no inputs fit" where these do not match the installed torch.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from public_models_measure import Row, Uint2, Uint8, measure
from public_models_report import show, show_comparison
from public_models_subject import Subject, Unmeasured
from rich.console import Console
from rich.progress import track

from brevitas_bp.codec import codec_from

sys.path.insert(0, str(Path(__file__).parents[1] / "efficientnet_v2"))


@dataclass(frozen=True)
class Knobs:
    """Settings of the study.

    Attributes:
        bucket_size: elements that share a scale.
        seed: of dropout, of the loss and of the rounding.
        most_parameters: of a model; larger ones are counted, not run.
        noise: added to parameters that start constant.
        seconds: time limit of a model.
        memory_gib: address space of a model.
    """

    bucket_size: int = 256
    seed: int = 1
    most_parameters: int = 100_000_000
    noise: float = 0.05
    seconds: float = 120
    memory_gib: int = 16


#: Source -> module, and the names of its functions: one lists models, the other builds one.
SOURCES = {
    "transformers": ("public_models_transformers", "names", "build"),
    "timm": ("public_models_vision", "timm_names", "build_timm"),
    "torchvision": ("public_models_vision", "torchvision_names", "build_torchvision"),
}


def list_models(sources: list[str]) -> list[str]:
    """Names of models, each with its source."""
    found = []
    for source in sources:
        module, names, _ = SOURCES[source]
        found += [f"{source}/{name}" for name in getattr(importlib.import_module(module), names)()]
    return found


def measure_model(model: str, knobs: Knobs) -> Row:
    """In this process."""
    source, _, name = model.partition("/")
    module, _, function = SOURCES[source]
    build: Callable[[str, int, float], Subject] = getattr(importlib.import_module(module), function)
    start = time.monotonic()
    try:
        row = measure(
            model, lambda: build(name, knobs.most_parameters, knobs.noise),
            seed=knobs.seed, bucket_size=knobs.bucket_size)
    except Unmeasured as reason:
        row = Row(model, reason.status, reason.detail)
    return replace(row, seconds=round(time.monotonic() - start, 2))


def child(connection: Connection, model: str, knobs: Knobs) -> None:
    """Silent, within limits; sends the row."""
    resource.setrlimit(resource.RLIMIT_AS, (knobs.memory_gib << 30,) * 2)
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    warnings.simplefilter("ignore")
    connection.send(measure_model(model, knobs))


def measure_apart(model: str, knobs: Knobs) -> Row:
    """In a forked process, which may hang or die."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender, model, knobs))
    process.start()
    sender.close()
    try:
        if receiver.poll(knobs.seconds):
            return receiver.recv()
        return Row(model, "out of time", seconds=knobs.seconds)
    except EOFError:
        process.join()
        return Row(model, "process died", f"exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def warm_kernels(knobs: Knobs) -> None:
    """Compiles what every child needs. Backward must not run here: autograd does not survive a fork."""
    for config in (Uint2, Uint8):
        codec = codec_from(config, bucket_size=knobs.bucket_size, metadata_dtype=torch.bfloat16)
        codec.encode(torch.randn(4, 1024), seed=0).decode()


def load(path: Path) -> dict[str, Row]:
    """Rows of earlier runs."""
    if not path.exists():
        return {}
    rows = (Row(**json.loads(line)) for line in path.read_text().splitlines())
    return {row.model: row for row in rows}


def run(models: list[str], out: Path, knobs: Knobs, minutes: float) -> dict[str, Row]:
    """Measures the models that the file has not, until the time is over."""
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = load(out)
    end = time.monotonic() + 60 * minutes
    missing = [model for model in models if model not in rows]
    if missing and minutes > 0:
        warm_kernels(knobs)
    for model in track(missing, console=Console(stderr=True)):
        if time.monotonic() >= end:
            break
        rows[model] = measure_apart(model, knobs)
        with out.open("a") as file:
            file.write(json.dumps(asdict(rows[model])) + "\n")
    return rows


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sources", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    parser.add_argument("--only", default="", help="regular expression, searched for in source/name")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no model after that")
    parser.add_argument("--seconds", type=float, default=Knobs.seconds, help="time limit of a model")
    parser.add_argument("--seed", type=int, default=Knobs.seed)
    parser.add_argument("--out", type=Path, default=Path("runs/public_models.jsonl"))
    parser.add_argument("--compare", type=Path, metavar="OTHER.jsonl", help="measure nothing, compare")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(words)
    if options.compare is not None:
        kept, other = (
            [row for row in load(path).values() if re.search(options.only, row.model)]
            for path in (options.out, options.compare))
        show_comparison(kept, other, options.markdown)
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    models = [m for m in list_models(options.sources) if re.search(options.only, m)]
    knobs = Knobs(seconds=options.seconds, seed=options.seed)
    rows = run(models, options.out, knobs, options.minutes)
    show([rows[model] for model in models if model in rows], options.markdown)


if __name__ == "__main__":
    main()
