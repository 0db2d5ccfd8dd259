"""Class-conditional models of the LlamaGen kind (arXiv 2406.06525): a Llama over a grid of codes, behind the embedding of a class.

Shapes: B batch rows, n columns of a pass, L tokens of an image, V codes, D channels.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig

from parallel_decode.adapters.causal_lm.guidance import Guidance
from parallel_decode.adapters.image_tokens.llamagen import renamed
from parallel_decode.adapters.image_tokens.model import ImageModel, Request, joined
from parallel_decode.adapters.image_tokens.prior import Prior

PHOTOGRAPHS = Path(__file__).parent / "assets" / "photographs"


class ClassConditional(ImageModel):
    """A prior over codes and the tokenizer that they are of.

    `generate_images` reads `{"labels": (B,)}`: classes from 0, and `num_classes` for none. Guidance leads away from no class, as LlamaGen's.

    Args:
        prior: of codes.
        tokenizer: diffusers' `VQModel`; without one there are tokens and no pixels.

    Raises:
        ValueError: prior and tokenizer have different numbers of codes.

    Example:
        >>> import torch
        >>> from parallel_decode.adapters.image_tokens import generate_images
        >>> images = generate_images(photographs(), {"labels": torch.tensor([3])}, generator=torch.Generator().manual_seed(0))
        >>> images.tokens.shape, images.pixels.shape
        (torch.Size([1, 256]), torch.Size([1, 3, 64, 64]))
    """

    def __init__(self, prior: Prior, tokenizer: VQModel | None = None) -> None:
        config: Any = prior.config
        vq: Any = tokenizer
        codes = config.vocab_size if vq is None else vq.config.num_vq_embeddings
        if codes != config.vocab_size:
            raise ValueError(f"the tokenizer has {codes} codes, expected the prior's {config.vocab_size}")
        super().__init__(prior, config.vocab_size, config.rows, config.columns)
        self.tokenizer, self.num_classes = vq, int(config.num_classes)
        self.generation_config = GenerationConfig(do_sample=True)  # type: ignore[no-untyped-call]

    def request(self, inputs: dict[str, Any], guidance_scale: float | None) -> Request:
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point() or not len(labels):
            found = tuple(labels.shape) if isinstance(labels, Tensor) else labels
            raise ValueError(f'inputs["labels"] is {found!r}, expected whole numbers of shape (B,)')
        if int(labels.min()) < 0 or int(labels.max()) > self.num_classes:
            raise ValueError(
                f"labels are from {int(labels.min())} to {int(labels.max())}, expected 0 to {self.num_classes - 1}, or {self.num_classes} for no class"
            )
        ids = labels.to(self.device).long()[:, None] + self.tokens
        mask, places, guidance = torch.ones_like(ids), torch.zeros_like(ids), None
        if guidance_scale is not None and guidance_scale > 1:
            negative = torch.full_like(ids, self.tokens + self.num_classes)
            guidance = Guidance(guidance_scale, negative, mask, places, of_logits=True)
        return Request(ids, mask, places, guidance)

    def embed(self, ids: Tensor) -> Tensor:
        return joined(ids, self.tokens, self.model.model.embed_tokens, self.model.classes)

    def decode(self, **inputs: Any) -> Tensor:
        return self.model.model(**inputs).last_hidden_state  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden)  # type: ignore[no-any-return]

    def pixels(self, tokens: Tensor) -> Tensor | None:
        vq = self.tokenizer
        if vq is None:
            return None
        codes = vq.quantize.get_codebook_entry(tokens, (len(tokens), self.rows, self.columns, -1))
        decoded = vq.decoder(vq.post_quant_conv(codes), codes if vq.config.norm_type == "spatial" else None)
        return (decoded.float() / 2 + 0.5).clamp(0, 1)  # type: ignore[no-any-return]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        vq = None if self.tokenizer is None else json.loads(self.tokenizer.to_json_string())
        config = {"prior": self.model.config.to_diff_dict(), "tokenizer": vq}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(
            {name: weight.contiguous() for name, weight in self.state_dict().items()}, folder / "model.safetensors"
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ClassConditional":
        """What `save_pretrained` wrote, in float32.

        Raises:
            ValueError: a file is missing or damaged, or they do not belong together.
        """
        try:
            config = json.loads((Path(folder) / "config.json").read_text())
            vq = config["tokenizer"]
            prior = Prior(LlamaConfig.from_dict(config["prior"]))
            model = cls(prior, None if vq is None else VQModel.from_config(vq))  # type: ignore[no-untyped-call]
            model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"{folder} cannot be read, expected a folder that save_pretrained wrote: {type(error).__name__}: {reason}"
            ) from None
        return model.float().eval()

    @classmethod
    def from_llamagen(
        cls, state: Mapping[str, Tensor], tokenizer: VQModel | None = None, *, head_dim: int = 64, rows: int = 16
    ) -> "ClassConditional":
        """A published class-conditional model (c2i), from its state dict.

        LlamaGen's own tokenizer is no `VQModel`: without one decode the tokens by its `decode_code`.

        Args:
            state: `torch.load(file, map_location="cpu", weights_only=True)["model"]`.
            tokenizer: of the codes.
            head_dim: channels of a head; 64 in all published sizes.
            rows: of the square grid; 16 for pictures of 256 pixels, 24 for 384.

        Raises:
            ValueError: names or shapes are not those of such a model.
        """
        config, weights = renamed(state, head_dim, rows)
        prior = Prior(config)
        prior.load_state_dict(weights)
        return cls(prior, tokenizer).to(state["output.weight"].dtype).eval()


def photographs() -> ClassConditional:
    """The model that comes with this package: crops of ten photographs, 64 x 64 pixels of 16 x 16 tokens, trained by `python -m paper_repro image-tokens`.

    Classes: 0 astronaut, 1 cat, 2 coffee, 3 rocket, 4 motorcycle, 5 galaxies, 6 tissue, 7 retina, 8 temple, 9 flower.
    """
    return ClassConditional.from_pretrained(PHOTOGRAPHS)
