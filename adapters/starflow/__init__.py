"""STARFlow (Gu et al., arXiv 2506.06276; of video 2511.20462), decoded in parallel.

A STARFlow is a TarFlow over the latents of an autoencoder: a deep block that reads a text, and shallow ones after it that do not. Parameters and
buffers are named as in Apple's public checkpoints, which load as they are, given the arguments of the published constructor.
"""

from parallel_decode.adapters.starflow.flow import StarFlow as StarFlow
from parallel_decode.adapters.starflow.pipeline import Pipeline as Pipeline
