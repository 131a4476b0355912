"""Ready-made quantizers, named in Brevitas' grammar.

``[Shifted](U)int{bits}[Mix{bits}|Avg{size}]DynamicActPer{Tensor|Bucket}Float[L2][Stochastic]``

* "Shifted": it has a zero point.
* "Dynamic": it takes its range from the current tensor.
* "Mix": it chooses between two widths.
* "Avg": it quantizes the mean of ``size`` neighbours, which then take ``bits / size`` bits each.
"""

from brevitas_bp.quant.act import affine, averaged, mixed, symmetric, thesis
from brevitas_bp.quant.act.affine import *  # noqa: F403
from brevitas_bp.quant.act.averaged import *  # noqa: F403
from brevitas_bp.quant.act.mixed import *  # noqa: F403
from brevitas_bp.quant.act.symmetric import *  # noqa: F403
from brevitas_bp.quant.act.thesis import *  # noqa: F403

__all__: list[str] = []
__all__ += affine.__all__
__all__ += averaged.__all__
__all__ += mixed.__all__
__all__ += symmetric.__all__
__all__ += thesis.__all__
