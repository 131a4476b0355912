"""Wraps published models of transformers, timm and torchvision: errors of the gradient, and bytes.

    python examples/studies/public_models.py --only '/(bert|llama|t5|vit|resnet18)$'    # a minute
    python examples/studies/public_models.py [--sources timm] [--minutes 60] [--markdown]
    python examples/studies/public_models.py --compare runs/public_models_before.jsonl

The study covers these sources:

- transformers: every model type with a base class (tiny configurations). "lm" are its causal language
  models with their loss, "bfloat16" the same under autocast, "eager" models with written-out attention.
- timm: the smallest model of each family.
- torchvision: all models for images and clips.

Models have up to 100 million parameters, random weights, and train with dropout. Nothing is downloaded.
For each model the study measures:

- Whether outputs, buffers and random state equal the plain model's; and all gradients too, under
  ``policy="exact"``.
- The error ``|g~ - g| / |g|`` of the whole gradient, for one draw at the default policy with 2 and with
  8 bits.
- The bytes saved for backward, exact and at 2 bits; and which operations keep bytes exact.

Each model runs in its own process, with a time limit. The script appends each result at once. A stopped
run continues where it stopped. The file keeps models without figures too, with the reason: remove their
lines to try them again. ``--minutes 0`` measures nothing and prints the results so far.

Expect from the first command: no differences; errors below 1.2 at 2 bits and below 0.02 at 8 bits. The
whole study takes some two hours on one core. Some detectors (Faster, Mask and Keypoint R-CNN) need the
compiled operators of torchvision. If these do not match the installed torch, the detectors count as "no
inputs fit".
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
from public_models_measure import EightBits, Row, TwoBits, measure
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
        seed: seed of dropout, of the loss and of the rounding.
        most_parameters: largest model to run; larger models are only counted.
        noise: standard deviation of the noise added to parameters that start constant.
        seconds: time limit of a model.
        memory_gib: limit of a model's address space, in GiB.
    """

    bucket_size: int = 256
    seed: int = 1
    most_parameters: int = 100_000_000
    noise: float = 0.05
    seconds: float = 120
    memory_gib: int = 16


#: Source -> module, and the names of two functions in it: one lists models, the other builds one.
SOURCES = {
    "transformers": ("public_models_transformers", "names", "build"),
    "lm": ("public_models_transformers", "lm_names", "build_lm"),
    "eager": ("public_models_transformers", "names", "build_eager"),
    "bfloat16": ("public_models_transformers", "lm_names", "build_bfloat16"),
    "timm": ("public_models_vision", "timm_names", "build_timm"),
    "torchvision": ("public_models_vision", "torchvision_names", "build_torchvision"),
}


def list_models(sources: list[str]) -> list[str]:
    """Returns names of models, each with its source."""
    found = []
    for source in sources:
        module, names, _ = SOURCES[source]
        found += [f"{source}/{name}" for name in getattr(importlib.import_module(module), names)()]
    return found


def measure_model(model: str, knobs: Knobs) -> Row:
    """Measures a model in this process."""
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
    """Measures a model without output and within limits; sends the row."""
    resource.setrlimit(resource.RLIMIT_AS, (knobs.memory_gib << 30,) * 2)
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    warnings.simplefilter("ignore")
    connection.send(measure_model(model, knobs))


def measure_apart(model: str, knobs: Knobs) -> Row:
    """Measures a model in a forked process, which may hang or die."""
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
    """Compiles what every child needs, without backward: autograd does not survive a fork."""
    for config in (TwoBits, EightBits):
        codec = codec_from(config, bucket_size=knobs.bucket_size, metadata_dtype=torch.bfloat16)
        codec.encode(torch.randn(4, 1024), seed=0).decode()


def load(path: Path) -> dict[str, Row]:
    """Returns rows of earlier runs."""
    if not path.exists():
        return {}
    rows = (Row(**json.loads(line)) for line in path.read_text().splitlines())
    return {row.model: row for row in rows}


def run(models: list[str], out: Path, knobs: Knobs, minutes: float) -> dict[str, Row]:
    """Measures the models that have no row in the file, until the time is over."""
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
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no model later")
    parser.add_argument("--seconds", type=float, default=Knobs.seconds, help="time limit of a model")
    parser.add_argument("--seed", type=int, default=Knobs.seed)
    parser.add_argument("--out", type=Path, default=Path("runs/public_models.jsonl"))
    parser.add_argument("--compare", type=Path, metavar="OTHER.jsonl", help="only compare with it")
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
