"""ImageGPT (Chen et al., Generative Pretraining from Pixels, 2020) of transformers: a token is a pixel, of 512 colours."""

from typing import Any

import torch
from torch import Tensor

from parallel_decode.adapters.image_tokens.model import ImageModel, Request, prompts


class ImageGPT(ImageModel):
    """`ImageGPTForCausalImageModeling`. A prompt is the token of a beginning (`vocab_size` - 1), and pixels of the picture that are there already, as many in each
    row of the batch; what is drawn is the others.

    Pixels take `inputs["clusters"]`, those of the image processor: colours from -1 to 1, shape (V, 3).
    """

    def __init__(self, model: Any) -> None:
        side = round(model.config.n_positions**0.5)
        super().__init__(model, model.config.vocab_size - 1, side, model.config.n_positions // side)
        self.colours: Tensor | None = None

    def request(self, inputs: dict[str, Any], guidance_scale: float | None) -> Request:
        ids, mask = prompts(inputs)
        if guidance_scale not in (None, 1):
            raise ValueError(
                f"guidance_scale is {guidance_scale}, expected None: ImageGPT has no prompt to be guided by"
            )
        if not bool(mask.all()):
            raise ValueError(
                "attention_mask hides columns: ImageGPT's prompts have to be equally long, without padding"
            )
        count = self.rows * self.columns
        if bool((ids[:, 0] != self.tokens).any()) or ids.shape[1] > count or bool((ids[:, 1:] >= self.tokens).any()):
            raise ValueError(
                f"input_ids has shape {tuple(ids.shape)} and begins with {ids[:, 0].tolist()}, expected {self.tokens} and then less than {count} pixels below that"
            )
        if (colours := inputs.get("clusters")) is not None:
            self.colours = torch.as_tensor(colours, dtype=torch.float32, device=ids.device)
            if self.colours.shape != (self.tokens, 3):
                raise ValueError(f"clusters has shape {tuple(self.colours.shape)}, expected ({self.tokens}, 3)")
        self.given = ids[:, 1:]
        begun = self.given.shape[1]
        return Request(ids, grids=((self.rows, self.columns),), length=count - begun, begun=begun)

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)  # type: ignore[no-any-return]

    def decode(self, **inputs: Any) -> Tensor:
        return self.model.transformer(**inputs).last_hidden_state  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden)  # type: ignore[no-any-return]

    def pixels(self, tokens: Tensor) -> Tensor | None:
        if self.colours is None:
            return None
        given = self.given.repeat_interleave(len(tokens) // len(self.given), 0)
        colours = self.colours[torch.cat([given, tokens], 1)].view(len(tokens), self.rows, self.columns, 3)
        return (colours.permute(0, 3, 1, 2) / 2 + 0.5).clamp(0, 1)
