"""The limits that determine occupancy, for the GPUs that the ledger compiles for.

The figures are from the makers: the compute-capability tables in NVIDIA's CUDA C++ programming guide, and AMD's CDNA 3
and CDNA 4 architecture papers. No figure was measured, because none of these GPUs was available.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """One GPU and the limits of its multiprocessors.

    Attributes:
        product: the product that has this number of multiprocessors.
        multiprocessors: number of SMs, or of AMD's compute units.
        block_shared: bytes of shared memory that one block may have.
        shared: bytes of shared memory of a multiprocessor, for all its blocks.
        warps: the most warps that are resident on a multiprocessor at once.
        blocks: the most blocks that are resident on a multiprocessor at once.
        warp_size: threads of a warp.
        registers: 32-bit registers of a multiprocessor.
        register_unit: registers are allocated to a warp in multiples of this number.
        block_reserve: bytes of shared memory that the system takes for each block.
        issue_rate: instructions that a multiprocessor issues in one clock, over all its warps. An SM has four
            schedulers. On AMD GPUs, each of the four SIMDs of a compute unit needs four clocks for a vector instruction
            of 64 lanes.
    """

    product: str
    multiprocessors: int
    block_shared: int
    shared: int
    warps: int
    blocks: int
    warp_size: int = 32
    registers: int = 65536
    register_unit: int = 256
    block_reserve: int = 1024
    issue_rate: int = 4

    def resident_blocks(self, warps: int, registers: int, shared: int) -> int:
        """Return the number of blocks that one multiprocessor holds at once.

        Args:
            warps: warps of a block.
            registers: 32-bit registers of a thread.
            shared: bytes of shared memory of a block.
        """
        of_warp = -(-max(registers, 1) * self.warp_size // self.register_unit) * self.register_unit
        by_registers = self.registers // of_warp // warps
        by_shared = self.shared // (shared + self.block_reserve) if shared + self.block_reserve else self.blocks
        return min(self.blocks, self.warps // warps, by_registers, by_shared)


def _amd(product: str, units: int, lds: int) -> Machine:
    # a compute unit has four SIMDs, each with 512 vector registers a lane and at most 8 waves
    return Machine(
        product, units, lds, lds, warps=32, blocks=16, warp_size=64,
        registers=4 * 512 * 64, register_unit=8 * 64, block_reserve=0, issue_rate=1,
    )  # fmt: skip


MACHINES = {
    "sm_80": Machine("A100", 108, 166_912, 167_936, warps=64, blocks=32),
    "sm_86": Machine("RTX A6000", 84, 101_376, 102_400, warps=48, blocks=16),
    "sm_89": Machine("L40S", 142, 101_376, 102_400, warps=48, blocks=24),
    "sm_90": Machine("H100 SXM", 132, 232_448, 233_472, warps=64, blocks=32),
    "sm_100": Machine("B200", 148, 232_448, 233_472, warps=64, blocks=32),
    "sm_120": Machine("RTX PRO 6000", 188, 101_376, 102_400, warps=48, blocks=24),
    "gfx942": _amd("MI300X", 304, 65_536),
    "gfx950": _amd("MI355X", 256, 163_840),
}
