"""Hardware counters (Nsight Compute) of our kernels: memory, tensor cores, occupancy, and why warps wait.

    python benchmarks/kernel_counters.py         # the Hopper kernels: benchmarks/results/kernel_counters.json
    python benchmarks/kernel_counters.py step    # the Triton kernels of a decoding step: step_counters.json

The script starts itself again under `ncu`. That tool repeats each launch for each group of counters and empties the
caches before each. The kernels of the backward pass are measured by benchmarks/backward_counters.py.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import record
import torch

from jrt import ops, presets
from jrt.model import LanguageModel
from jrt.ops import cuda

HEADS, DIM, VALUE_DIM = 16, 16, 64
LAUNCHES = (("JRT-RNN", 16, 32768), ("JRT-RNN", 1, 32768), ("decode step", 128, 1))  # what, B, N
KERNELS = {
    "hopper": re.compile("prefill_text|prefill_state|add_pieces|decode_kernel"),
    "step": re.compile(
        "_linear_attention_kernel|_attention_kernel|_selective_kernel|gated_kernel|partial_kernel|residual_kernel"
        "|project_kernel|_norm_kernel"
    ),
}
STEPS = (("jrt-360m", "CPS", 128), ("jrt-360m", "CP", 1), ("mamba-360m", "M", 1))  # preset, its layers here, B
SCALE = {"ns": 1e-3, "us": 1, "ms": 1e3, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}  # to microseconds and bytes
COUNTERS = {  # our name: ncu's
    "microseconds": "gpu__time_duration.sum",
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_bytes_read": "dram__bytes_read.sum",
    "dram_bytes_written": "dram__bytes_write.sum",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    "tensor_pipe_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "issue_slots_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "occupancy_possible_percent": "sm__maximum_warps_per_active_cycle_pct",
    "registers": "launch__registers_per_thread",
    "blocks": "launch__grid_size",
    "shared_bytes": "launch__shared_mem_per_block",
    "spills_executed": "sass__inst_executed_local_stores",
}
STALL = re.compile(r"smsp__pcsamp_warps_issue_stalled_(\w+?)(_not_issued)?$")


def launch_step() -> None:
    """Decodes one step with models of a few layers and the sizes of the released models."""
    from jrt.decoding.fused import FusedStep  # needs Triton

    torch.manual_seed(0)
    for preset, pattern, batch in STEPS:
        config = dataclasses.replace(presets()[preset], pattern=pattern)
        with torch.device("cuda"), torch.no_grad():
            step = FusedStep(LanguageModel(config).to(torch.bfloat16), batch, 2048)
            step.position.column.fill_(1024)
            step.likeliest(step.advance(torch.zeros(batch, dtype=torch.long)))
    torch.cuda.synchronize()


def launch_hopper() -> None:
    """Launches each kernel once, on inputs with the model's shapes and dtypes."""
    torch.manual_seed(0)

    def tokens(batch: int, length: int, size: int) -> torch.Tensor:
        return torch.randn(batch, length, HEADS, size, device="cuda", dtype=torch.bfloat16)

    for what, batch, length in LAUNCHES:
        q, k, v = (tokens(batch, length, size) for size in (DIM, DIM, VALUE_DIM))
        if what == "decode step":
            state = ops.encode_prefix(tokens(batch, 64, DIM), tokens(batch, 64, VALUE_DIM), backend="chunked")
            cuda.decode_step(q, k, v, ops.State(*(x.contiguous() for x in state)))
        else:
            half = length // 2
            state = ops.encode_prefix(tokens(batch, half, DIM), tokens(batch, half, VALUE_DIM), backend="cuda")
            ops.linear_attention(q, k, v, initial_state=state, backend="cuda")
    torch.cuda.synchronize()


def number(text: str) -> float:
    return float(text.replace(",", ""))


def counted(page: Path, kernel: re.Pattern[str]) -> list[dict]:
    """Reads ncu's raw page. Returns one row for each launch, in order; `kernel` finds the kernel's name.

    A counter that ncu did not give is None."""
    with open(page, newline="") as file:
        lines = [line for line in file if line.startswith('"')]
    units, *launches = csv.DictReader(lines)
    rows = []
    for line in launches:
        name = kernel.search(line["Kernel Name"])
        assert name is not None
        row: dict = {"method": name[0]}
        for name, counter in COUNTERS.items():
            value = line.get(counter)
            row[name] = number(value) * SCALE.get(units[counter], 1) if value else None
        stalls = {}
        for column, value in line.items():
            match = STALL.match(column or "")
            if match and value and not match[2]:
                stalls[match[1]] = number(value)
        total = sum(stalls.values()) or 1
        ordered = sorted(stalls.items(), key=lambda item: -item[1])
        row["stall_percent"] = {name: round(100 * value / total, 1) for name, value in ordered[:8]}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kernels", choices=KERNELS, nargs="?", default="hopper")
    parser.add_argument("--launch", action="store_true", help="only run the kernels (what ncu starts)")
    parser.add_argument("--page", type=Path, default=Path("kernel_counters.csv"), help="where ncu's raw page goes")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    hopper = arguments.kernels == "hopper"
    if arguments.launch:
        launch_hopper() if hopper else launch_step()
        return
    if shutil.which("ncu") is None:
        parser.error("needs ncu, Nsight Compute, on PATH")
    if not hopper:
        launch_step()  # compiles, so that ncu meets finished kernels
    kernel = KERNELS[arguments.kernels]
    command = ["ncu", "--clock-control", "none", "--metrics", ",".join(COUNTERS.values())]
    command += ["--section", "SourceCounters", "--kernel-name", f"regex:{kernel.pattern}"]
    command += ["--page", "raw", "--csv", sys.executable, __file__, arguments.kernels, "--launch"]
    with open(arguments.page, "w") as page:
        subprocess.run(command, stdout=page, check=True)
    rows = counted(arguments.page, kernel)
    for row in rows:
        print(row)
    name, launches = ("kernel_counters", LAUNCHES) if hopper else ("step_counters", STEPS)
    print(record.write(name, rows, arguments.output, launches=[list(each) for each in launches]))


if __name__ == "__main__":
    main()
