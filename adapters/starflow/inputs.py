"""What users hand to a STARFlow: each function returns it as the flow takes it, or raises a ValueError (a TypeError for the wrong kind).

Shapes: B batch, F frames, C channels, S the text's length, T its width.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from parallel_decode._options import check_at_least_one
from parallel_decode.adapters.tarflow.inputs import check_floats

if TYPE_CHECKING:
    from parallel_decode.adapters.starflow.density import Density


def check_latents(flow: "Density", name: str, x: Any, video: bool | None = None) -> None:
    """Raise unless these are latents, (B, C, H, W) or (B, F, C, H, W), that fit the flow."""
    config, p = flow.config, flow.config.patch_size
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} is a {type(x).__name__}, expected a tensor of latents, (B, C, H, W) or (B, F, C, H, W)"
        )
    if x.dim() not in (4, 5) or 0 in x.shape[1:] or (video is not None and video != (x.dim() == 5)):
        wanted = {None: "(B, C, H, W) or (B, F, C, H, W)", True: "(B, F, C, H, W)", False: "(B, C, H, W)"}[video]
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected latents {wanted}")
    check_floats(name, x, (*x.shape[1:-3], config.in_channels, *x.shape[-2:]), flow.noise_like.device)
    if x.shape[-2] % p or x.shape[-1] % p:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected height and width that patch_size, {p}, divides")
    if not config.rope and tuple(x.shape[-2:]) != (config.img_size, config.img_size):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, and this flow has embeddings of places: expected height and width {config.img_size}"
        )
    if x.dim() == 5 and not (config.rope and config.txt_size and config.use_pretrained_lm is None):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, a video, and this flow has no places in time (rope with txt_size): expected (B, C, H, W)"
        )


def check_text(flow: "Density", text: Any, rows: int, name: str = "text") -> Tensor | None:
    """The text for so many rows, shape (B, S, T); None where the flow reads none."""
    size, width = flow.config.txt_size, flow.config.txt_dim
    if not width:
        if text is not None:
            raise ValueError(f"{name} was given, and this flow reads none (txt_dim=0): leave it out")
        return None
    if text is None:
        raise ValueError(
            f"this flow reads a text: pass {name}, the encoder's output of shape (batch, {size}, {width}), zeros where the prompt is padded"
        )
    check_floats(name, text, (size, width), flow.noise_like.device)
    if len(text) not in (1, rows):
        raise ValueError(f"{name} has {len(text)} rows, expected 1 or {rows}")
    return text.expand(rows, -1, -1)  # type: ignore[no-any-return]


def texts(flow: "Density", text: Any, null: Any, guidance: float, rows: int) -> Tensor | None:
    """The text of each row, and with guidance after them as many without a prompt, shape (B or 2 B, S, T)."""
    found = check_text(flow, text, rows)
    if not guidance:
        return found
    if found is None:
        raise ValueError(f"guidance is {guidance}, and this flow reads no text to be guided by: leave it out")
    return torch.cat([found, cast(Tensor, check_text(flow, null, rows, "text_unconditional"))])


def first_frames(flow: "Density", frames: Any, z: Tensor) -> Tensor:
    """The first frames of videos for each row of z (B, F, C, H, W), of its dtype."""
    check_latents(flow, "frames", frames, video=True)
    if len(frames) not in (1, len(z)) or frames.shape[2:] != z.shape[2:]:
        raise ValueError(f"frames has shape {tuple(frames.shape)}, expected the first frames of z, {tuple(z.shape)}")
    return frames.to(z.dtype).expand(len(z), *frames.shape[1:])  # type: ignore[no-any-return]


def stretches(flow: "Density", frames: int, given: int, context_length: Any) -> list[tuple[int, int, int]]:
    """The stretches of a video that the deep block reads at a time: each begins at a frame, is decoded from another, and ends before a third."""
    window = flow.config.local_attn_window or frames
    context = window - 1 if context_length is None else context_length
    if context_length is not None:
        check_at_least_one("context_length", context_length)
    if given >= min(frames, window):
        raise ValueError(f"{given} frames are given, expected fewer than {min(frames, window)}, those read at a time")
    if frames > window and not 1 <= context < window:
        raise ValueError(
            f"context_length is {context}, expected 1 to {window - 1}: local_attn_window has {window} frames"
        )
    if (given or frames > window) and not (flow.config.temporal_causal and flow.config.shallow_block_local):
        raise ValueError("given frames, or windows of frames, need temporal_causal and shallow_block_local")
    found = [(0, given, min(window, frames))]
    while (done := found[-1][2]) < frames:
        found.append((done - context, done, min(done - context + window, frames)))
    return found
