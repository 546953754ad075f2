"""Measures each kernel's share of the time of a decoding step that is captured as a CUDA graph.

    python benchmarks/step_profile.py

Kernels start before the one before them has ended, so their own durations overlap. A kernel's share is the time from the
end of the kernel before it to its own end; shares add up to the replay. Models have random weights and a prompt of 1,024.

Shapes: B rows, N prompt tokens.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import generation
import record
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from jrt import JRTForCausalLM
from jrt.decoding.session import RUN, CapturedSession

PROMPT, NEW = 1024, 34
STEPS = (("jrt-360m", 1), ("jrt-360m", 16), ("jrt-360m", 128), ("jrt-1.3b", 1), ("mamba-360m", 1))  # model, B


def replay_ms(graph: torch.cuda.CUDAGraph, session: CapturedSession) -> float:
    """Returns the median milliseconds of one replay, measured over several replays in a row."""
    times = []
    for _ in range(10):
        session.count.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(RUN // 2):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / (RUN // 2))
    return statistics.median(times)


def shares(graph: torch.cuda.CUDAGraph, session: CapturedSession) -> dict[str, list[float]]:
    """Returns the microseconds of each launch, by the name of the kernel."""
    session.count.zero_()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        graph.replay()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.end)
    found: dict[str, list[float]] = {}
    last = events[0].time_range.start
    for event in events:
        found.setdefault(event.name[:60], []).append(event.time_range.end - last)
        last = event.time_range.end
    return found


def measure(model: JRTForCausalLM, name: str, batch: int, speed: float) -> dict:
    ids = torch.randint(0, model.config.vocab_size, (batch, PROMPT), device="cuda")
    generation.Method(name).generate(model, ids, NEW)
    [(_, session)] = model.sessions.kept
    assert isinstance(session, CapturedSession)
    [graph] = session.choosing.values()
    ms = replay_ms(graph.cuda, session)
    kernels = [
        {"kernel": kernel, "launches": len(times), "microseconds": sum(times), "median": statistics.median(times)}
        for kernel, times in shares(graph.cuda, session).items()
    ]
    generation.free(model)
    return {
        "method": name,
        "shape": {"B": batch, "N": PROMPT},
        "ms": ms,
        "tokens_per_s": 1e3 * batch / ms,
        "floor_ms": generation.step_bytes(model, batch, PROMPT) / speed,
        "kernels": sorted(kernels, key=lambda row: -row["microseconds"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    speed = generation.bytes_per_ms("cuda")
    rows = []
    for name, batch in STEPS:
        model = generation.make_model(name, "cuda")
        assert isinstance(model, JRTForCausalLM)
        rows.append(measure(model, name, batch, speed))
        print(f"{name} B{batch}: {rows[-1]['ms']:.3f} ms, floor {rows[-1]['floor_ms']:.3f} ms")
        for row in rows[-1]["kernels"]:
            print(f"    {row['microseconds']:8.1f} us {row['launches']:4d} x {row['median']:6.2f} {row['kernel']}")
        del model
    print(record.write("step_profile", rows, arguments.output, bytes_per_ms=speed))


if __name__ == "__main__":
    main()
