"""Saving and resuming, in a job of the same size or of another size."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from brevitas_bp import QuantBackwardWrapper
from tests.distributed import ddp, fsdp
from tests.distributed.support import (
    Facts,
    Wrap,
    batch,
    digest,
    float_net,
    grads,
    rank,
    step,
    whole,
    wrapper,
)


class Job:
    """A network with dropout (in DDP, in FSDP2 or alone), its optimizer, and how both are saved."""

    def __init__(self, engine: str, seed: int | None = 7) -> None:
        make = {"ddp": ddp.inside, "ddp outside": ddp.outside, "fsdp": fsdp.outside,
                "fsdp inside": fsdp.inside, "alone": _alone}[engine]
        self.model = make(float_net(dropout=0.2), wrapper(seed=seed))
        self.wrapper = next(
            m for m in self.model.modules() if isinstance(m, QuantBackwardWrapper))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        # The network itself: its keys name neither the wrapper nor DDP.
        core = self.wrapper.module
        self.core: nn.Module = core.module if isinstance(core, ddp.DDP) else core
        torch.manual_seed(rank())  # so ranks draw different dropout masks

    def steps(self, count: int, seed: int | None = None) -> "Job":
        """Trains for some steps."""
        if seed is not None:
            torch.manual_seed(seed)
        for _ in range(count):
            self.optimizer.zero_grad()
            step(self.model, batch(rank()))
            self.optimizer.step()
        return self

    @property
    def parameters(self) -> str:
        """Returns a digest of all parameters, gathered."""
        return digest([whole(p) for p in self.model.parameters()])

    @property
    def grads(self) -> str:
        """Returns a digest of all gradients, gathered."""
        return digest(grads(self.model))

    def save(self, folder: Path) -> None:
        """Saves by torch.distributed.checkpoint: rank 0's noise for all, each rank's generators."""
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, torch.get_rng_state())
        model, optimizer = get_state_dict(self.core, self.optimizer)
        content = {"model": model, "optimizer": optimizer, "noise": self.wrapper.noise_state()}
        content |= {f"generator {i}": state for i, state in enumerate(states)}
        dcp.save(content, checkpoint_id=folder)

    def load(self, folder: Path, generators: bool) -> "Job":
        """Loads what :meth:`save` saved, in a job of any size."""
        model, optimizer = get_state_dict(self.core, self.optimizer)
        content = {"model": model, "optimizer": optimizer, "noise": {"base": 0, "position": 0}}
        if generators:
            content[f"generator {rank()}"] = torch.get_rng_state()
        dcp.load(content, checkpoint_id=folder)
        set_state_dict(
            self.core, self.optimizer, model_state_dict=content["model"],
            optim_state_dict=content["optimizer"])
        self.wrapper.set_noise_state(content["noise"])
        if generators:
            torch.set_rng_state(content[f"generator {rank()}"])
        return self


def _alone(net: nn.Module, wrap: Wrap) -> nn.Module:
    return wrap(net)


ENGINES = ("ddp", "ddp outside", "fsdp", "fsdp inside")


def resume(folder: Path) -> Facts:
    """Trains four steps; and two steps, a checkpoint, two more; the control leaves out the noise."""
    facts: Facts = {}
    for engine in ENGINES:
        job = Job(engine).steps(2)
        job.save(folder / f"two {engine}")
        saved, noise = job.parameters, job.wrapper.noise_state()
        straight = job.steps(2).parameters
        resumed = Job(engine).load(folder / f"two {engine}", generators=True)
        loaded = resumed.parameters, resumed.wrapper.noise_state()
        forgetful = Job(engine).load(folder / f"two {engine}", generators=True)
        forgetful.wrapper.set_noise_state({**noise, "position": 0})
        facts[engine] = {
            "saved": saved, "noise": noise, "loaded": loaded, "straight": straight,
            "resumed": resumed.steps(2).parameters, "forgetful": forgetful.steps(2).parameters}
    return facts


def seeds(folder: Path) -> Facts:
    """Returns noise states of processes that seed torch differently, with and without an own seed."""
    return {str(seed): Job("ddp", seed=seed).wrapper.noise_state() for seed in (None, 7)}


def continue_alone(folder: Path) -> Facts:
    """Resumes a job of two processes in one, and saves for two again."""
    facts: Facts = {}
    for engine in ENGINES:
        def load(engine: str = engine) -> Job:
            return Job("alone").load(folder / f"two {engine}", generators=False)

        job = load()
        facts[engine] = {
            "loaded": job.parameters, "noise": job.wrapper.noise_state(),
            "next": [j.steps(1, seed=1).parameters for j in (job, load())]}
        job.save(folder / f"one {engine}")
        facts[engine] |= {"saved": job.parameters, "left": job.wrapper.noise_state()}
    return facts


def continue_in_two(folder: Path) -> Facts:
    """Resumes a job of one process in two."""
    facts: Facts = {}
    for engine in ENGINES:
        job, again = (
            Job(engine).load(folder / f"one {engine}", generators=False) for _ in range(2))
        facts[engine] = {
            "loaded": job.parameters, "noise": job.wrapper.noise_state(),
            "next": [j.steps(1, seed=1).parameters for j in (job, again)]}
    return facts


SCENARIOS = {
    "state resume": resume, "state seeds": seeds, "state alone": continue_alone,
    "state in two": continue_in_two}
