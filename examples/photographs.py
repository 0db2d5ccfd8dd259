"""Pictures of a class-conditional model that comes with the package, drawn three ways.

python examples/photographs.py [FILE.png]
"""

import sys

import torch

import parallel_decode as pd
from parallel_decode.adapters.image_tokens import generate_images
from parallel_decode.adapters.image_tokens.class_conditional import photographs

model, labels = photographs(), {"labels": torch.arange(10)}
for schedule, sampling in (("sequential", "gumbel"), ("auto", "gumbel"), (pd.Sliding(16, per_row=True), "maximal")):
    images = generate_images(
        model, labels, schedule=schedule, sampling=sampling, generator=torch.Generator().manual_seed(0)
    )
    print(
        f"{schedule}, {sampling}: {images.solution.passes} passes (forwards of the model) for {model.length} tokens a picture"
    )
if len(sys.argv) > 1:
    images.to_pil()[0].save(sys.argv[1])
