"""What adapters of networks with a key-value cache share: which inputs a pass reads, and where keys and values are kept."""

from parallel_decode.cached.reads import Reads, RowReads
from parallel_decode.cached.storage import KeyValueStorage

__all__ = ["KeyValueStorage", "Reads", "RowReads"]
