"""TarFlow (Zhai et al., *Normalizing Flows are Capable Generative Models*, arXiv 2412.06329), decoded in parallel.

A TarFlow is a stack of causal transformers over image patches. Each block maps x to z_l = (x_l - b_l(x_<l)) exp(-a_l(x_<l))
in one pass; its inverse x_l = z_l exp(a_l(x_<l)) + b_l(x_<l) is a triangular system, and sampling is a chain of
them, the last block first. Parameters and buffers are named as in Apple's public checkpoints, which load as they are.
"""

from parallel_decode.adapters.tarflow.flow import TarFlow as TarFlow
from parallel_decode.adapters.tarflow.flow import digits as digits
