"""Builds models of torchvision and timm, with the smallest images they accept; nothing is downloaded."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from public_models_subject import Subject, finish
from torch import Tensor

from vision import import_torchvision  # isort: skip

#: Pixels to try, after the size that a timm model was made for, if the model accepts no other size.
SIZES = (64, 96, 128, 224, 256, 299)

#: Kinds of torchvision models to build. Quantized models do not train, so they are left out.
KINDS = ("classification", "segmentation", "detection", "video", "optical_flow")

#: Words for the size of a model in timm's names, from the smallest.
SMALL = (
    "zepto", "atto", "femto", "pico", "nano", "xxtiny", "xxt", "xxsmall", "xxs", "xtiny", "xt", "xsmall",
    "xs", "tiny", "t", "mini", "small", "s")
LARGE = (
    "large", "l", "xl", "xlarge", "xxl", "huge", "h", "giant", "g", "gigantic", "so400m", "1b", "3b")


# torchvision


def torchvision_kinds() -> dict[str, str]:
    """Returns name of a model -> kind."""
    import_torchvision()
    models = import_torchvision("torchvision.models")
    packages = {kind: getattr(models, kind, models) for kind in KINDS}
    return {
        name: kind for kind, package in packages.items() for name in models.list_models(module=package)}


def torchvision_names() -> list[str]:
    """Returns every model name, by kind."""
    return list(torchvision_kinds())


def detection_target(size: int) -> dict[str, Tensor]:
    """Returns two objects, with the masks and key points that some detectors need."""
    boxes = torch.tensor([[4, 4, 36, 36], [20, 16, 60, 56]]) * size / 64
    points = torch.stack([boxes[:, :2] + 4, boxes[:, 2:] - 4], 1).repeat(1, 9, 1)[:, :17]
    return {
        "boxes": boxes, "labels": torch.tensor([1, 2]),
        "masks": torch.ones(2, size, size, dtype=torch.uint8),
        "keypoints": torch.cat([points, torch.ones(2, 17, 1)], 2)}


def torchvision_inputs(kind: str) -> Iterator[tuple[Any, ...]]:
    """Yields batches of two, the smallest images first."""
    generator = torch.Generator().manual_seed(0)
    if kind == "video":
        for frames, size in ((8, 64), (16, 112), (16, 224)):
            yield (torch.randn(2, 3, frames, size, size, generator=generator),)
        return
    for size in SIZES:
        images = torch.randn(2, 3, size, size, generator=generator)
        if kind == "detection":
            yield list(images), [detection_target(size), detection_target(size)]
        elif kind == "optical_flow":
            yield images, images.roll(2, -1)
        else:
            yield (images,)


def build_torchvision(name: str, most_parameters: int, std: float) -> Subject:
    """Builds one model with random weights."""
    models = import_torchvision("torchvision.models")
    kind = torchvision_kinds()[name]
    options: dict[str, Any] = {"weights": None}
    if kind in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if kind == "detection":
        options["num_classes"] = 2 if "keypoint" in name else 3
        if not name.startswith("ssd"):  # these resize to the size that they were made for
            options |= {"min_size": 64, "max_size": 128}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return finish(
        lambda: models.get_model(name, **options), lambda _: torchvision_inputs(kind),
        most_parameters, std)


# timm


def size_of(name: str) -> tuple[Any, ...]:
    """Returns a sort key: small models of a family come first, as far as their names tell."""
    words = [word.rstrip("0123456789") for word in re.sub(r"_(x+)_", r"_\1", name).split("_")]
    place = next(
        (SMALL.index(word) for word in words if word in SMALL),
        len(SMALL) + any(word in LARGE for word in words))
    return place, [int(number) for number in re.findall(r"\d+", name)] or [10**6], len(name)


def family(name: str) -> str:
    """Returns the first word with its version: convnextv2 for convnextv2_atto, resnet for resnet18."""
    found = re.match(r"[a-z]+?(?:v\d|(?=[\d_]|$))", name)
    return found.group() if found else name


def timm_names() -> list[str]:
    """Returns the smallest model of each family in each module, as far as names tell."""
    import_torchvision()
    import timm

    listed = [
        (module, family(name), name) for module in timm.list_modules()
        for name in timm.list_models(module=module) if not name.startswith("test_")]
    return [
        min((name for *_, name in group), key=size_of)
        for _, group in itertools.groupby(sorted(listed), key=lambda item: item[:2])]


def build_timm(name: str, most_parameters: int, std: float) -> Subject:
    """Builds one model with random weights."""
    import_torchvision()
    import timm

    published = timm.get_pretrained_cfg(name)
    fixed = published is not None and published.fixed_input_size
    native = published.input_size[-1] if published is not None else 224
    generator = torch.Generator().manual_seed(0)
    sizes = dict.fromkeys((native,) if fixed else (*SIZES, native))
    candidates = ((torch.randn(2, 3, size, size, generator=generator),) for size in sizes)
    return finish(
        lambda: timm.create_model(name, pretrained=False), lambda _: candidates, most_parameters, std)
