"""Ready-made quantizers, named in Brevitas' grammar.

``[Shifted](U)int{bits}[Mix{bits}|Avg{size}]DynamicActPer{Tensor|Bucket}Float[L2][Stochastic|Dithered]``
``RotatedNormal{bits}[Mix{bits}]DynamicActPerBucketFloat``
``RotatedUint{bits}DynamicActPerBucketFloatDithered``

* "Shifted": it has a zero point.
* "Rotated": it rotates each bucket at random first.
* "Normal": its codes stand for Lloyd-Max levels of the normal distribution.
* "Dithered": decoding subtracts the noise that encoding has added.
* "Dynamic": it takes its range from the current tensor.
* "Mix": it chooses between two widths.
* "Avg": it quantizes the mean of ``size`` neighbours, which then take ``bits / size`` bits each.
"""

from brevitas_bp.quant.act import affine, averaged, mixed, rotated, symmetric, thesis
from brevitas_bp.quant.act.affine import *  # noqa: F403
from brevitas_bp.quant.act.averaged import *  # noqa: F403
from brevitas_bp.quant.act.mixed import *  # noqa: F403
from brevitas_bp.quant.act.rotated import *  # noqa: F403
from brevitas_bp.quant.act.symmetric import *  # noqa: F403
from brevitas_bp.quant.act.thesis import *  # noqa: F403

__all__: list[str] = []
__all__ += affine.__all__
__all__ += averaged.__all__
__all__ += mixed.__all__
__all__ += rotated.__all__
__all__ += symmetric.__all__
__all__ += thesis.__all__
