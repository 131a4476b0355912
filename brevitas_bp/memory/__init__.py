"""Bytes that autograd keeps for backward, measured on live tensors."""

from brevitas_bp.memory.counts import SavedMemory, SavedMemoryRow, SavedMemoryStep
from brevitas_bp.memory.report import SavedMemoryReport
from brevitas_bp.memory.track import track_saved_memory

__all__ = [
    "SavedMemory", "SavedMemoryReport", "SavedMemoryRow", "SavedMemoryStep", "track_saved_memory"]
