"""A GPU that is not here: a driver under which Triton compiles the library's own launches, and starts none.

The launchers run as they are, on meta tensors at the public shapes; what they asked for and what the compiler made of
it is recorded. Needs a process without ``TRITON_INTERPRET``.
"""

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Binary:
    """The machine code of one kernel with one set of constants.

    Attributes:
        kernel: name of the Triton function.
        hash: of its source and constants, Triton's own.
        arch: such as ``sm_90``.
        shared: bytes of shared memory of a block.
        warps: of a block.
        stages: of the software pipeline.
        constants: the kernel's constexprs by name.
        files: what the compiler wrote, by file name.
    """

    kernel: str
    hash: str
    arch: str
    shared: int
    warps: int
    stages: int
    constants: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)

    @cached_property
    def listing(self) -> str:
        """The machine code as text: NVIDIA's disassembled, with resource usage; AMD's as the compiler wrote it."""
        by_kind = {Path(path).suffix: path for path in self.files.values()}
        if ".amdgcn" in by_kind:
            return Path(by_kind[".amdgcn"]).read_text()
        command = [str(TOOLS / "cuobjdump"), "-sass", "-res-usage", by_kind[".cubin"]]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass
class CompiledLaunch:
    """One launch: which binary, on which grid."""

    binary: Binary
    grid: tuple[int, int, int]


class CompileOnlyDriver:
    """Stands where Triton's driver stands. Each architecture is a device of its own, with compile caches of its own."""

    def __init__(self, arch: str) -> None:
        """Be one GPU of architecture `arch`, one of ``ARCHITECTURES``."""
        self.arch = arch
        self.launches: list[CompiledLaunch] = []
        self.utils = self
        cuda = re.fullmatch(r"sm_(\d+)", arch)
        self.target = GPUTarget("cuda", int(cuda[1]), 32) if cuda else GPUTarget("hip", arch, 64)

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """A number of its own for each architecture, since Triton caches by it."""
        return ARCHITECTURES.index(self.arch)

    def get_current_stream(self, device: int) -> int:
        """None."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where tensors stand."""
        return torch.device("meta")

    def get_device_properties(self, device: int) -> dict[str, int]:
        """No limit on shared memory: the ledger judges that, and reports by how much."""
        return {"max_shared_mem": 1 << 30}

    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple[None, None, int, int, int]:
        """Nothing is loaded."""
        return None, None, 0, 0, 1024

    def unload_module(self, module: None) -> None:
        """Nothing was."""

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Called for every binary, maybe again; returns what Triton calls for every launch of it."""
        constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}
        binary = Binary(
            metadata.name, metadata.hash, self.arch, metadata.shared, metadata.num_warps, metadata.num_stages, constants
        )
        self.loading = binary

        def launch(x: int, y: int, z: int, *_: Any) -> None:
            # Triton keeps a binary for the next driver of its architecture
            active: Any = triton.runtime.driver.active
            active.launches.append(CompiledLaunch(binary, (x, y, z)))

        return launch

    def keep_files(self, module: Any, function: Any, name: str, files: dict[str, str], key: str) -> None:
        """Triton's hook before a binary is loaded."""
        self.loading.files = files


@contextmanager
def compiling_for(arch: str) -> Iterator[list[CompiledLaunch]]:
    """Within the block, kernels launched on meta tensors are compiled for `arch` and recorded in the list it yields.

    Raises:
        ValueError: `arch` is not one of ``ARCHITECTURES``.
        RuntimeError: kernels are interpreted in this process.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are compiled only in a process without TRITON_INTERPRET")
    compile_only = CompileOnlyDriver(arch)
    hooks: Any = triton.knobs.runtime.kernel_load_start_hook
    driver: Any = triton.runtime.driver
    driver.set_active(compile_only)
    hooks.add(compile_only.keep_files)
    try:
        yield compile_only.launches
    finally:
        hooks.remove(compile_only.keep_files)
        driver.set_active(None)
