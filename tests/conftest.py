"""Tests learn anew, and leave nothing behind."""

import os

os.environ["PARALLEL_DECODE_CACHE"] = "off"
