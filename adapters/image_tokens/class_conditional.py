"""Class-conditional models of the LlamaGen kind (arXiv 2406.06525): a Llama over a grid of codes, behind the embedding of a class.

Shapes: B batch rows, n columns of a pass, L tokens of an image, V codes, D channels.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig

from parallel_decode._json_file import read_json, reason
from parallel_decode._options import check_at_least_one, check_kind
from parallel_decode._outputs import aside
from parallel_decode._weight_files import fill, read_weights
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
        with aside(folder / "config.json") as part:
            part.write_text(json.dumps(config, indent=2) + "\n")
        with aside(folder / "model.safetensors") as part:
            save_file({name: weight.contiguous() for name, weight in self.state_dict().items()}, part)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ClassConditional":
        """What `save_pretrained` wrote, in float32.

        Raises:
            ValueError: a file is missing or damaged, or they do not belong together.
        """
        folder = Path(folder)
        try:
            config = read_json(folder / "config.json")
            check_kind("config.json", config, dict, "entries prior and tokenizer")
            state = read_weights(folder / "model.safetensors")
            with torch.device("meta"):
                model = cls(Prior(_prior_config(config["prior"], state)), _tokenizer(config["tokenizer"], state))
            fill(model, state, "model.safetensors")
        except Exception as error:  # noqa: BLE001 - transformers and diffusers raise all kinds over damaged configurations
            raise ValueError(
                f"{folder} cannot be read, expected a folder that save_pretrained wrote: {type(error).__name__}: {reason(error)}"
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
        with torch.device("meta"):
            prior = Prior(config)
        fill(prior, weights, "state")
        return cls(prior, tokenizer).to(state["output.weight"].dtype).eval()


def photographs() -> ClassConditional:
    """The model that comes with this package: crops of ten photographs, 64 x 64 pixels of 16 x 16 tokens, trained by `python -m paper_repro image-tokens`.

    Classes: 0 astronaut, 1 cat, 2 coffee, 3 rocket, 4 motorcycle, 5 galaxies, 6 tissue, 7 retina, 8 temple, 9 flower.
    """
    return ClassConditional.from_pretrained(PHOTOGRAPHS)


def _prior_config(entries: dict[str, Any], state: Mapping[str, Tensor]) -> LlamaConfig:
    """The prior's configuration; entries of other models are refused, as transformers acts on some: it may download code for attention."""
    check_kind("prior", entries, dict, "entries of a LlamaConfig")
    unknown = entries.keys() - LlamaConfig().to_dict().keys() - {"num_classes", "rows", "columns"}
    if unknown:
        raise ValueError(f"the prior has the entries {sorted(unknown)}, which are not a Llama's")
    config = LlamaConfig.from_dict(entries)
    _check_size("num_hidden_layers", config.num_hidden_layers, 9, state)
    return config


def _tokenizer(entries: dict[str, Any] | None, state: Mapping[str, Tensor]) -> VQModel | None:
    if entries is None:
        return None
    check_kind("tokenizer", entries, dict, "entries of a VQModel, or null")
    blocks = sum(len(entries[name]) for name in ("down_block_types", "up_block_types"))
    _check_size("layers_per_block", entries["layers_per_block"], 8 * blocks, state)
    return VQModel.from_config({**entries})  # type: ignore[no-any-return, no-untyped-call]


def _check_size(name: str, number: Any, each: int, state: Mapping[str, Tensor]) -> None:
    """Before anything is built: with so many weights `each`, there have to be as many."""
    check_at_least_one(name, number)
    if number * each > len(state):
        raise ValueError(f"{name} is {number}, and there are {len(state)} weights, expected {number * each} or more")
