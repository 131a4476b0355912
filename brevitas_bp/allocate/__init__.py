"""The right bits in the right place, at the right time."""

from brevitas_bp.allocate.schedule import QuantizerSchedule

__all__ = ["QuantizerSchedule"]
