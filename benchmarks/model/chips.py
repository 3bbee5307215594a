"""GPUs on paper, and the share of their data sheets that is assumed to be reached where nothing was measured."""

import dataclasses
from dataclasses import dataclass

# Of a data sheet's rate: what a copy, a large product and a link reach.
COPY, PRODUCTS, LINKS = 0.9, 0.8, 0.8


@dataclass(frozen=True)
class Chip:
    """What a GPU can do on paper. Links: one direction, for each GPU."""

    name: str
    memory_gb_per_s: float
    bfloat16_tflops: float  # dense
    float32_tflops: float  # without tensor cores
    tf32_tflops: float  # dense
    memory_gib: float
    launch_gap_us: float  # from one kernel to the next, both launched ahead
    nvlink_gb_per_s: float
    network_gb_per_s: float  # between nodes
    pcie_gb_per_s: float
    gpus_per_node: int


H100 = Chip(
    name="H100 SXM",
    memory_gb_per_s=3350,  # data sheet of the H100 SXM: 3.35 TB/s
    bfloat16_tflops=989,  # the same: 1979 with sparsity
    float32_tflops=67,  # the same
    tf32_tflops=494,  # the same: 989 with sparsity
    memory_gib=80e9 / 2**30,  # the same: 80 GB
    launch_gap_us=1.5,  # assumed, in no data sheet
    nvlink_gb_per_s=450,  # data sheet: 900 GB/s, both directions
    network_gb_per_s=50,  # data sheet of the DGX H100: eight ports of 400 Gb/s for eight GPUs
    pcie_gb_per_s=64,  # data sheet: Gen5, 128 GB/s, both directions
    gpus_per_node=8,  # data sheet of the DGX H100
)
H200 = dataclasses.replace(
    H100,  # data sheets of the H200 SXM and the DGX H200: as the H100 SXM but for the memory
    name="H200 SXM",
    memory_gb_per_s=4800,  # data sheet of the H200 SXM: 4.8 TB/s
    memory_gib=141e9 / 2**30,  # the same: 141 GB
)
A100 = Chip(
    name="A100 80GB SXM",
    memory_gb_per_s=2039,  # data sheet of the A100 80GB SXM
    bfloat16_tflops=312,  # the same
    float32_tflops=19.5,  # the same
    tf32_tflops=156,  # the same
    memory_gib=80e9 / 2**30,  # the same: 80 GB
    launch_gap_us=1.5,  # assumed, in no data sheet
    nvlink_gb_per_s=300,  # data sheet: 600 GB/s, both directions
    network_gb_per_s=25,  # data sheet of the DGX A100: eight ports of 200 Gb/s for eight GPUs
    pcie_gb_per_s=32,  # data sheet: Gen4, 64 GB/s, both directions
    gpus_per_node=8,  # data sheet of the DGX A100
)
CHIPS = {"h200": H200, "h100": H100, "a100": A100}


def assumed_ceilings(chip: Chip) -> dict:
    """In place of those of a result file."""
    rates = {"bfloat16": chip.bfloat16_tflops, "float32": chip.float32_tflops, "tf32": chip.tf32_tflops}
    tflops = {name: PRODUCTS * rate for name, rate in rates.items()}
    return {"copy_gb_per_s": COPY * chip.memory_gb_per_s, "tflops": tflops, "launch_us": chip.launch_gap_us}
