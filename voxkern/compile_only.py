"""Compile kernels for a GPU that this machine lacks, with a Triton driver that compiles kernels but runs none.

The library's own launch functions run unchanged, on meta tensors. Each launch is recorded, together with the compiled
machine code. The process must run without ``TRITON_INTERPRET``.
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

# architecture -> multiprocessors of a GPU with it: A100, RTX A6000, L40S, H100, B200, RTX PRO 6000, MI300X, MI355X
ARCHITECTURES = {
    "sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 188, "gfx942": 304, "gfx950": 256,
}  # fmt: skip
OVERLAPPING = ("sm_90", "sm_100", "sm_120")  # architectures on which launches can overlap, see kernels/overlap.py
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Binary:
    """Holds the machine code of one kernel with one set of constants.

    Attributes:
        kernel: name of the Triton function.
        hash: Triton's hash of source and constants.
        arch: architecture, such as ``sm_90``.
        shared: bytes of shared memory per block.
        warps: warps per block.
        stages: stages of the software pipeline.
        constants: the kernel's constexprs by name.
        overlaps: whether launches start while the launch before them runs.
        files: paths of the files that the compiler wrote, by file name.
    """

    kernel: str
    hash: str
    arch: str
    shared: int
    warps: int
    stages: int
    constants: dict[str, Any]
    overlaps: bool = False
    files: dict[str, str] = field(default_factory=dict)

    @cached_property
    def listing(self) -> str:
        """The machine code as text: disassembled with resource usage for NVIDIA, the compiler's assembly for AMD."""
        by_kind = {Path(path).suffix: path for path in self.files.values()}
        if ".amdgcn" in by_kind:
            return Path(by_kind[".amdgcn"]).read_text()
        command = [str(TOOLS / "cuobjdump"), "-sass", "-res-usage", by_kind[".cubin"]]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass
class CompiledLaunch:
    """Records the binary and the grid of one launch."""

    binary: Binary
    grid: tuple[int, int, int]


class CompileOnlyDriver:
    """Replaces Triton's active driver: compiles kernels for one architecture, records their launches, and runs none.

    Triton treats each architecture as a separate device, with separate compile caches.
    """

    def __init__(self, arch: str) -> None:
        """`arch`: the architecture to compile for, one of ``ARCHITECTURES``."""
        self.arch = arch
        self.launches: list[CompiledLaunch] = []
        self.utils = self
        cuda = re.fullmatch(r"sm_(\d+)", arch)
        self.target = GPUTarget("cuda", int(cuda[1]), 32) if cuda else GPUTarget("hip", arch, 64)

    def get_current_target(self) -> GPUTarget:
        """Return the target to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Return a device number that differs between architectures, because Triton's cache has one part per number."""
        return list(ARCHITECTURES).index(self.arch)

    def get_current_stream(self, device: int) -> int:
        """Return 0, because a launch that does not run needs no stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Return the meta device, which all tensors are on."""
        return torch.device("meta")

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return the number of multiprocessors, and a limit of shared memory of 1 GiB, which no kernel reaches.

        The ledger reports kernels that exceed the real limit.
        """
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": ARCHITECTURES[self.arch]}

    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple[None, None, int, int, int]:
        """Load nothing; return (module, function, registers, spills, limit of threads per block) as Triton expects."""
        return None, None, 0, 0, 1024

    def unload_module(self, module: None) -> None:
        """Do nothing, because no module was loaded."""

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return the function that Triton calls for each launch of a binary; repeated calls are allowed."""
        constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}
        binary = Binary(
            metadata.name, metadata.hash, self.arch, metadata.shared, metadata.num_warps, metadata.num_stages,
            constants, getattr(metadata, "launch_pdl", False),
        )  # fmt: skip
        self.loading = binary

        def launch(x: int, y: int, z: int, *_: Any) -> None:
            # the active driver may not be `self`: Triton reuses a binary under a later driver of the same architecture
            active: Any = triton.runtime.driver.active
            active.launches.append(CompiledLaunch(binary, (x, y, z)))

        return launch

    def keep_files(self, module: Any, function: Any, name: str, files: dict[str, str], key: str) -> None:
        """Store the files of the binary that is being loaded; Triton calls this hook before each load."""
        self.loading.files = files


@contextmanager
def compiling_for(arch: str) -> Iterator[list[CompiledLaunch]]:
    """Compile for `arch` all kernels launched on meta tensors in the ``with`` block; yield the list of their launches.

    Raises:
        ValueError: `arch` is not one of ``ARCHITECTURES``.
        RuntimeError: kernels are interpreted in this process (TRITON_INTERPRET=1).
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
