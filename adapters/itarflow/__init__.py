"""iTARFlow (*Normalizing Flows with Iterative Denoising*, arXiv 2604.20041), decoded in parallel.

A TarFlow of images with noise of a known level: its blocks, which may differ in depth, width and patch size, are also conditioned on the
level. Images are drawn at a high level and denoised step by step. Parameters and buffers are named as in Apple's code, and checkpoints
load as they are.
"""

from parallel_decode.adapters.itarflow.flow import ITarFlow as ITarFlow
