"""A wheel with compiled kernels is for Linux on x86-64, and for every Python 3."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COMPILED = "src/headwise/ops/native/compiled"


class KernelsHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard" and list(Path(self.root, COMPILED).glob("*.so")):
            build_data.update(pure_python=False, tag="py3-none-linux_x86_64")
