from torch import Tensor

def norm_forward(
    x: Tensor | None,
    base: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    h: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    epsilon: float,
) -> None: ...
def norm_backward(
    dy: Tensor,
    h: Tensor,
    into: Tensor | None,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    dh: Tensor,
    dx: Tensor | None,
    d_weight: Tensor,
    d_bias: Tensor | None,
) -> None: ...
