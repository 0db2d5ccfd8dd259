"""Which kernels attention uses while a system is solved."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import cuda
from torch.backends import cuda as kernels

cudnn: Callable[[], bool] = kernels.cudnn_sdp_enabled
others: tuple[Callable[[], bool], ...] = (
    kernels.flash_sdp_enabled,
    kernels.mem_efficient_sdp_enabled,
    kernels.math_sdp_enabled,
)


@contextmanager
def without_plans() -> Iterator[None]:
    """Let `scaled_dot_product_attention` pass over cuDNN on a CUDA device, unless it is all that is enabled.

    From torch 2.11 on, Hopper and Blackwell take cuDNN's kernel first, in half precision. It builds a plan for each shape that it has not seen, which takes some
    40 ms, and in decoding nearly every pass has a shape of its own. The setting is the process's; whoever changed it changes it back.
    """
    switch: Callable[[bool], None] = kernels.enable_cudnn_sdp
    if not (cuda.is_initialized() and cudnn() and any(enabled() for enabled in others)):  # type: ignore[no-untyped-call]
        yield
        return
    switch(False)
    try:
        yield
    finally:
        switch(True)
