"""The scale of a bucket."""

from torch import Tensor, nn

from brevitas_bp.format.stages import NEUTRAL, Neutral


class RuntimeDynamicBucketScaling(nn.Module):
    """Computes the restricted scale ``statistic / threshold`` of a bucket. Fills ``scaling_impl``.

    ``threshold`` is Brevitas' name for the top code. Brevitas' ``RuntimeDynamicGroupStatsScaling``
    computes the same, with two differences:

    * There is no absolute minimum, so data of size 1e-30 keeps its levels.
    * The module is plain Python. The stock module is a ScriptModule under ``BREVITAS_JIT=1`` and would
      have to script the statistics.

    Args:
        scaling_stats_impl: buckets [N, B] -> range [N, 1].
        input_view_impl: the bucket view.
        restrict_scaling_impl: the allowed scales, for instance powers of two. It restricts the scale
            itself, so a restriction that rounds up never clips.
    """

    def __init__(
            self,
            scaling_stats_impl: nn.Module,
            input_view_impl: nn.Module,
            restrict_scaling_impl: nn.Module) -> None:
        super().__init__()
        self.scaling_stats_impl = scaling_stats_impl
        self.input_view_impl = input_view_impl
        self.restrict_scaling_impl = restrict_scaling_impl
        # The restriction may work on a quantity other than the scale, for instance its logarithm.
        self.restrict_scaling_pre = restrict_scaling_impl.restrict_init_module()  # pyright: ignore[reportCallIssue]

    def bucket_stage(self, slot: str) -> Neutral | None:
        """See :func:`brevitas_bp.codec.lowering.lower`."""
        return NEUTRAL if slot == "scaling_impl" else None

    def forward(self, x: Tensor, threshold: Tensor) -> Tensor:
        """Returns the scale [N, 1] of ``x`` for the top code ``threshold``, which is [N, 1] or 0-d."""
        scale = self.scaling_stats_impl(self.input_view_impl(x)) / threshold
        return self.restrict_scaling_impl(self.restrict_scaling_pre(scale))
