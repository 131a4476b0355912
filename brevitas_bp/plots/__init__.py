"""Pictures of reports, plans and measurements. matplotlib is imported only when one is drawn.

Each function returns a ``matplotlib.figure.Figure``. It uses no pyplot, needs no display and leaves no
state behind.
"""

from brevitas_bp.memory.picture import plot_saved_memory
from brevitas_bp.plots.gradient_error import plot_gradient_error
from brevitas_bp.plots.plan import plot_plan

__all__ = ["plot_gradient_error", "plot_plan", "plot_saved_memory"]
