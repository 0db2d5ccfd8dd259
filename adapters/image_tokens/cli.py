"""The command of image tokens: `parallel-decode images`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor

from parallel_decode._command_line import Command, Seed, check_picture
from parallel_decode._outputs import aside
from parallel_decode.schedules import Schedule, Sliding

if TYPE_CHECKING:
    from parallel_decode.adapters.image_tokens import Images

# The other modules are imported by the command itself: the other commands do not need them, and they take seconds.
app = typer.Typer()
RUNS = 3  # of each schedule, where they are compared


@app.command(cls=Command)
def images(
    n: Annotated[int, typer.Option(help="how many pictures, in one batch", min=1, max=4096)] = 16,
    classes: Annotated[
        str | None, typer.Option("--class", help="labels, as 3 or 0,1,2: repeated to n; all in turn if left out")
    ] = None,
    seed: Seed = 0,
    temperature: float = 1.0,
    top_k: Annotated[int, typer.Option(help="codes that may be drawn, the likeliest; 0 for all")] = 0,
    guidance_scale: Annotated[float, typer.Option(help="of classes; 1 for none")] = 1.0,
    schedule: Annotated[
        str, typer.Option(help="auto, sequential, jacobi, ..., or the width of a sliding window")
    ] = "auto",
    sampling: Annotated[str, typer.Option(help="gumbel, maximal or speculative")] = "gumbel",
    guess: Annotated[str, typer.Option(help="of tokens that no window has held: grid, left, above, last")] = "grid",
    model: Annotated[
        Path | None, typer.Option(help="a folder that save_pretrained wrote; the photographs if left out")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="draw one token after the other too, three times each, in turn")
    ] = False,
    out: Annotated[Path, typer.Option(help="where to draw the pictures", dir_okay=False)] = Path("images.png"),
) -> None:
    """Draw pictures by a class-conditional model of image tokens, in fewer forwards than tokens."""
    check_picture(out, ".png")
    try:
        from parallel_decode.adapters.image_tokens import generate_images
        from parallel_decode.adapters.image_tokens.class_conditional import ClassConditional, photographs
    except ModuleNotFoundError as error:
        hint = 'pip install "parallel-decode[demo,transformers,diffusers]"'
        raise ModuleNotFoundError(f"{error.name} is missing: {hint}") from None

    drawing = photographs() if model is None else ClassConditional.from_pretrained(model)
    if drawing.tokenizer is None:
        raise ValueError(f"--model is {model}, which has no tokenizer: expected one that makes pictures")
    labels = _labels(classes, n, drawing.num_classes)
    options: dict[str, Any] = {
        "sampling": sampling,
        "guess": guess,
        "temperature": temperature,
        "top_k": top_k,
        "guidance_scale": guidance_scale,
    }

    def draw(schedule: str | Schedule) -> "Images":
        generator = torch.Generator().manual_seed(seed)
        return generate_images(drawing, {"labels": labels}, schedule=schedule, generator=generator, **options)

    rule = Sliding(int(schedule), per_row=True) if schedule.isdecimal() else schedule
    names: dict[str, Any] = {schedule: rule} | ({"sequential": "sequential"} if compare else {})
    drawn = [{name: draw(each) for name, each in names.items()} for _ in range(RUNS if compare else 1)]
    pixels = drawn[-1][schedule].pixels
    assert pixels is not None
    save_grid(pixels, out, min(n, 8))
    for name in names:
        seconds = sorted(run[name].solution.layers[0].seconds for run in drawn)[len(drawn) // 2]
        typer.echo(
            f"{name}: {drawn[-1][name].solution.passes} forwards for {drawing.length} tokens a picture, {seconds:.2f} s"
        )
    if compare and sampling == "gumbel":
        same = torch.equal(drawn[-1][schedule].tokens, drawn[-1]["sequential"].tokens)
        typer.echo("the same tokens" if same else "other tokens: two scores were the same but for rounding")
    typer.echo(f"the pictures: {out}")


def _labels(text: str | None, n: int, num_classes: int) -> Tensor:
    """Of n pictures."""
    try:
        given = list(range(num_classes)) if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--class is {text!r}, expected labels such as 3 or 0,1,2") from None
    if not 0 <= min(given) <= max(given) <= num_classes:
        raise ValueError(f"--class is {text!r}, expected 0 to {num_classes - 1}, or {num_classes} for no class")
    return torch.tensor([given[i % len(given)] for i in range(n)])


def save_grid(pixels: Tensor, file: Path, columns: int) -> None:
    """Pictures (B, C, H, W) in [0, 1] as one PNG.

    Raises:
        ValueError: they are not finite.
    """
    from PIL import Image

    if not pixels.isfinite().all():
        raise ValueError(f"{file} is not written: some pictures are not finite, check the model")
    rows = -(-len(pixels) // columns)
    filled = torch.cat([pixels, pixels.new_ones(rows * columns - len(pixels), *pixels.shape[1:])])
    grid = filled.reshape(rows, columns, *pixels.shape[1:]).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    with aside(file) as part:
        Image.fromarray((grid * 255).round().byte().cpu().numpy()).save(part, format="PNG")
