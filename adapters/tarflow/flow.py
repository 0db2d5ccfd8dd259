"""The flow of images with noise of one level: `TarFlow`, and one that comes with the package."""

from importlib.resources import as_file, files

from torch import Tensor, nn

from parallel_decode.adapters.tarflow.config import Config
from parallel_decode.adapters.tarflow.guidance import Guidance
from parallel_decode.adapters.tarflow.images import ImageFlow, fixed
from parallel_decode.adapters.tarflow.inputs import Labels, native
from parallel_decode.adapters.tarflow.model import MetaBlock
from parallel_decode.system import LayeredSystem


class TarFlow(ImageFlow):
    """A TarFlow over images.

    Args:
        in_channels: channels of an image.
        img_size: height and width of an image, in pixels.
        patch_size: height and width of a patch; L = (img_size / patch_size)^2.
        channels: width of the transformers, a multiple of 64 (the size of a head).
        num_blocks: blocks of the flow.
        layers_per_block: transformer layers of each block.
        nvp: whether a block scales (a and b) or only shifts (b).
        num_classes: classes that samples can be conditioned on; 0 for none.
        noise_std: standard deviation of the noise that the images were trained with, for `denoise=True`; may be set later.

    Raises:
        TypeError: an argument of another kind.
        ValueError: sizes below 1, or that do not divide; `noise_std` that is negative or not finite.

    Example:
        >>> import torch
        >>> from parallel_decode.adapters.tarflow import TarFlow
        >>> flow = TarFlow(in_channels=1, img_size=8, patch_size=2, channels=64, num_blocks=2, layers_per_block=1)
        >>> z, logdet = flow(torch.zeros(3, 1, 8, 8))
        >>> z.shape, logdet.shape
        (torch.Size([3, 16, 4]), torch.Size([3]))
        >>> flow.sample(2, schedule="sliding").shape
        torch.Size([2, 1, 8, 8])
    """

    Config = Config
    patch_size: int = fixed("patch_size")

    def __init__(
        self,
        in_channels: int,
        img_size: int,
        patch_size: int,
        channels: int,
        num_blocks: int,
        layers_per_block: int,
        nvp: bool = True,
        num_classes: int = 0,
        noise_std: float | None = None,
    ) -> None:
        given = in_channels, img_size, patch_size, channels, num_blocks, layers_per_block, nvp, num_classes, noise_std
        config = Config(*map(native, given))
        length, dim = (img_size // patch_size) ** 2, in_channels * patch_size**2
        blocks = nn.ModuleList(
            MetaBlock(dim, channels, length, layers_per_block, i % 2 == 1, nvp, num_classes) for i in range(num_blocks)
        )
        super().__init__(config, blocks)

    @property
    def patch_sizes(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.patch_size,) * len(self.blocks)

    def forward(self, x: Tensor, y: Labels | None = None) -> tuple[Tensor, Tensor]:
        """Images to noise.

        Args:
            x: images, shape (B, in_channels, img_size, img_size).
            y: classes, shape (B,), or one for all; negative for the unconditional branch, as is None.

        Returns:
            z, shape (B, L, D), and log |det dz/dx|, shape (B,).

        Raises:
            TypeError: x is no tensor.
            ValueError: x or y does not fit this flow.
        """
        return self._encoded(x, y)

    def system(
        self,
        z: Tensor,
        *,
        y: Labels | None = None,
        guidance: float = 0.0,
        guide_what: str = "ab",
        annealed_guidance: bool = False,
        attn_temp: float = 1.0,
        compile: bool = False,
    ) -> LayeredSystem:
        """Sampling from z, for `pd.solve`; `Solution.value` then holds images, shape (B, in_channels, img_size, img_size).

        Args:
            z: the noise to start from, shape (B, L, D); decoded in float32 at least.
            y: classes, shape (B,), or one for all; negative or None for the unconditional branch.
            guidance: strength of guidance, by a conditional and an unconditional pass in one doubled batch; 0 for none.
            guide_what: which of the transform's "a" (log-scale) and "b" (shift) are guided.
            annealed_guidance: let the strength rise linearly over the positions.
            attn_temp: attention temperature of the unconditional branch.
            compile: on a CUDA device capture the windows as CUDA graphs, for this batch size, and keep them for the next
                calls; elsewhere, and with modules that were changed, it does nothing.

        Raises:
            TypeError: z is no tensor.
            ValueError: z or y of another shape or range than this flow's, or z not finite.
        """
        return self._system(z, y, Guidance(guidance, guide_what, annealed_guidance, attn_temp), compile)

    def denoised(self, x: Tensor, y: Labels | None = None) -> Tensor:
        """x + noise_std^2 grad log p(x): the mean of the clean image given the noisy one, if p is right (Tweedie).

        Args:
            x: images, shape (B, in_channels, img_size, img_size).
            y: classes, shape (B,), or one for all; negative or None for the unconditional branch.

        Raises:
            TypeError: x is no tensor.
            ValueError: x or y does not fit this flow, or the flow does not know the `noise_std` of its training.
        """
        variance = self._variance()
        self._check_images(x)
        return self._stepped(x, variance, y)


def digits() -> TarFlow:
    """The class-conditional flow over 16 x 16 digits that comes with the package.

    It has 4 blocks of 2 layers, patches of one pixel (L = 256) and 10 classes, and was trained on scikit-learn's
    digits by `python -m paper_repro train`. Its images go from -1 to 1.

    Example:
        >>> from parallel_decode.adapters.tarflow import digits
        >>> digits().sample(2, y=3, schedule="sliding").shape
        torch.Size([2, 1, 16, 16])
    """
    with as_file(files("parallel_decode.adapters.tarflow") / "assets" / "digits") as folder:
        return TarFlow.from_checkpoint(folder)
