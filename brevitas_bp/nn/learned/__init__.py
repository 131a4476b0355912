"""Learned quantization of weights and biases: ``floor(P / s) * s`` with a scale that training finds.

Source: Chinbat, "Learned Quantization Schemes for Data-centric ML Pipelines", 2025.
"""

from brevitas_bp.nn.learned.export import ExportedIntegers, export_integers, zipped_nbytes
from brevitas_bp.nn.learned.integers import IntegerReport, IntegerRow, report_integers
from brevitas_bp.nn.learned.learning import learn_quantization
from brevitas_bp.nn.learned.optimizing import (
    adam,
    keep_scales_positive,
    parameter_groups,
    ratio_gradients,
)
from brevitas_bp.nn.learned.penalties import Deviation, Difference, InverseScale, MaxBin, Penalty
from brevitas_bp.nn.learned.tensors import LearnedTensor, learned_tensors, named_learned_tensors

__all__ = [
    "Deviation", "Difference", "ExportedIntegers", "IntegerReport", "IntegerRow", "InverseScale",
    "LearnedTensor", "MaxBin", "Penalty", "adam", "export_integers", "keep_scales_positive",
    "learn_quantization", "learned_tensors", "named_learned_tensors", "parameter_groups",
    "ratio_gradients", "report_integers", "zipped_nbytes"]
