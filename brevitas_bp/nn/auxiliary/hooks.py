"""Forward hooks that begin and end the runs of a network."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from brevitas_bp.nn.auxiliary.run import AuxiliaryRun

# NOTE [ When a run is open ]
# 1. The first block of a run begins it, before it runs. The last block ends it, after it has run.
# 2. An exception in a block drops the run: torch calls the hooks of a failed module with None.
# 3. An exception elsewhere leaves the run open. So the network drops all runs before each forward pass.
# 4. After a forward pass, the network checks that all runs have ended. A run that has not would hold
#    memory, and a layer that runs alone later would take an activation of this pass.


class RunHooks:
    """The hooks of the blocks of one run.

    Args:
        run: the run.
    """

    def __init__(self, run: AuxiliaryRun) -> None:
        self.run = run

    def attach(self, blocks: Sequence[nn.Module]) -> None:
        """Adds the hooks to the blocks of the run, in their order."""
        blocks[0].register_forward_pre_hook(self.begin, with_kwargs=True)
        for block in blocks[:-1]:
            block.register_forward_hook(self.drop_if_failed, always_call=True)
        blocks[-1].register_forward_hook(self.end, always_call=True)

    def begin(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the first block."""
        inputs = args if args else tuple(kwargs.values())
        self.run.begin(inputs[0] if inputs else None)  # pyright: ignore[reportArgumentType]

    def drop_if_failed(self, block: nn.Module, args: Any, output: Any) -> None:
        """After a block that is not the last."""
        if output is None:
            self.run.reset()

    def end(self, block: nn.Module, args: Any, output: Any) -> None:
        """After the last block."""
        if output is None:
            self.run.reset()
        else:
            self.run.end()


class NetworkHooks:
    """The hooks of a network with runs.

    Args:
        runs: all its runs.
    """

    def __init__(self, runs: Sequence[AuxiliaryRun]) -> None:
        self.runs = list(runs)

    def attach(self, network: nn.Module) -> None:
        """Adds the hooks to the network."""
        network.register_forward_pre_hook(self.drop_all)
        network.register_forward_hook(self.check_all, always_call=True)

    def drop_all(self, network: nn.Module, args: Any) -> None:
        """Before the network."""
        for run in self.runs:
            run.reset()

    def check_all(self, network: nn.Module, args: Any, output: Any) -> None:
        """After the network.

        Raises:
            RuntimeError: a run has not ended.
        """
        left = [run for run in self.runs if run.is_open]
        self.drop_all(network, args)
        if left and output is not None:
            raise RuntimeError(
                f"brevitas_bp.nn.AuxiliaryRun: {left[0]!r} has begun in this forward pass and never "
                "ended, because the last block of the run did not run; end each run at a block that "
                "always runs")
