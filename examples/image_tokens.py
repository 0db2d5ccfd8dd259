"""Pictures of a class-conditional model that comes with the package, drawn three ways.

python examples/image_tokens.py [FILE.png]
"""

import sys

import torch

from parallel_decode.adapters.image_tokens import generate_images
from parallel_decode.adapters.image_tokens.class_conditional import photographs

model, labels = photographs(), {"labels": torch.arange(10)}
for options in ({"schedule": "sequential"}, {"schedule": "auto"}, {"schedule": "auto", "sampling": "maximal"}):
    images = generate_images(model, labels, generator=torch.Generator().manual_seed(0), **options)
    print(f"{options}: {images.solution.passes} forwards for {model.length} tokens a picture")
if len(sys.argv) > 1:
    images.to_pil()[0].save(sys.argv[1])
