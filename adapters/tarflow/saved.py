"""Flows that are saved and loaded: checkpoints, and the Hub."""

from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from typing_extensions import Self

from parallel_decode._fingerprint import fingerprint
from parallel_decode.adapters.tarflow import checkpoint
from parallel_decode.adapters.tarflow.config import FlowConfig


class Saved(nn.Module, PyTorchModelHubMixin):
    """A module that is saved with its arguments, and whose state dict has public names.

    Attributes:
        Config: what the arguments may be.
        constants: endings of names in published state dicts that need not be read.
    """

    Config: ClassVar[type[FlowConfig]]
    constants: ClassVar[tuple[str, ...]] = (".attn_mask",)

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self._hub_mixin_config: Any = config  # what `save_pretrained` writes
        self.register_load_state_dict_pre_hook(_as_named)  # type: ignore[no-untyped-call]

    @property
    def config(self) -> Any:
        """The arguments, a `Config`."""
        return self._hub_mixin_config

    def fingerprint(self) -> str:
        """What a plan knows the flow by: a hash of the names and shapes of the weights, and of some of their values."""
        return fingerprint(self)

    @classmethod
    def skipped(cls, name: str) -> bool:
        """Whether a file's tensor of this name need not be read."""
        return name.endswith(cls.constants)

    @classmethod
    def renamed(cls, name: str) -> str:
        """The name that this class has for a tensor of a public state dict."""
        return name

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **config: Any,
    ) -> Self:
        """A flow from a folder that `save_pretrained` wrote, or from a repository of the Hugging Face Hub.

        Args:
            pretrained_model_name_or_path: the folder, or the name of a repository.
            force_download, token, cache_dir, local_files_only, revision: see `huggingface_hub.snapshot_download`.
            config: arguments of the flow.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: see `from_checkpoint`.
        """
        hub: dict[str, Any] = dict(force_download=force_download, token=token, cache_dir=cache_dir, revision=revision)
        folder = checkpoint.folder(pretrained_model_name_or_path, local_files_only=local_files_only, **hub)
        return cls.from_checkpoint(folder, **config)

    @classmethod
    def from_checkpoint(cls, path: str | Path, **config: Any) -> Self:
        """A flow from a file of weights, such as Apple's, or from a folder that `save_pretrained` wrote.

        Args:
            path: a .pth or .safetensors file, or a folder.
            config: arguments of the flow. What is left out is taken from the folder, or read off the shapes of the weights; those of a
                `StarFlow` tell too little, so that all of its arguments have to be given with a file. How many channels an image has
                they leave open: 3 are assumed if a patch of 3 channels would be square, else 1; pass `in_channels` for others.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: the file is damaged, or holds something else than such a flow, or one of another configuration.
                Weights that are not finite are loaded; images drawn with them are not finite, of which `sample` warns.
        """
        return checkpoint.load(cls, path, config)


def _as_named(flow: Saved, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        value = state.pop(name)
        if not name.endswith(flow.constants):
            state[prefix + flow.renamed(name.removeprefix(prefix))] = value
