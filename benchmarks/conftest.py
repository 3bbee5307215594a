"""Options, the interleaved measurement of one row, and the table at the end of a run."""

from statistics import median, quantiles

import pytest
import torch

from benchmarks import measure, shapes

ROWS = pytest.StashKey[list[dict]]()
COLUMNS = ("shape", "op", "pass", "reference ms", "ours ms", "speed-up", "reference MiB", "ours MiB")


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks of mae_kernels")
    group.addoption("--size", choices=["small", "full"], default="small", help="small: minutes on two CPU cores")
    group.addoption("--rounds", type=int, default=10, help="at least; short calls get more, two seconds in all")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):  # before the plugin reads its options
    config.stash[ROWS] = []
    config.option.benchmark_columns = config.option.benchmark_columns or ["median", "iqr", "min", "rounds"]


def pytest_generate_tests(metafunc):
    for fixture, table in (("op_shape", shapes.OPS), ("step_shape", shapes.STEP)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, table[metafunc.config.getoption("size")], ids=lambda shape: shape.id)


@pytest.fixture
def race(benchmark, request):
    """Time one back-end, in every round right after all the others: a drift of the machine then meets them alike."""

    def run(shape, op, stage, backend, calls, *, dtype, logical_bytes, flops):
        benchmark.group, benchmark.name = f"{shape.id}, {op}, {stage}", backend
        for _ in range(2):  # the first warms up
            once = sum(map(measure.seconds, calls.values()))
        rounds = max(request.config.getoption("rounds"), min(int(2 / once), 500), 2)
        samples = {name: [] for name in calls}

        def time_one(name):
            samples[name].append(measure.seconds(calls[name]))

        def time_others():
            for name in calls:
                if name != backend:
                    time_one(name)

        benchmark.pedantic(time_one, [backend], setup=time_others, rounds=rounds)
        if benchmark.disabled:
            return
        medians = {name: median(values) for name, values in samples.items()}
        p20, *_, p80 = quantiles(samples[backend], n=5)
        row = {
            "shape": shape.id,
            "op": op,
            "pass": stage,
            "backend": backend,
            "dtype": dtype,
            "rounds": rounds,
            "median_ms": medians[backend] * 1e3,
            "p20_ms": p20 * 1e3,
            "p80_ms": p80 * 1e3,
            "logical_bytes": logical_bytes,
            "flops": flops,
            "images_per_s": shape.batch / medians[backend],
            "gb_per_s": logical_bytes / medians[backend] / 1e9,
            "peak_mib": measure.peak_mib(calls[backend]),
            **measure.conditions(),
        }
        if backend != measure.REFERENCE:
            reference = medians[measure.REFERENCE]
            row |= {
                "reference_ms": reference * 1e3,
                "speedup": reference / medians[backend],
                "reference_peak_mib": measure.peak_mib(calls[measure.REFERENCE]),
            }
            request.config.stash[ROWS].append(row)
        benchmark.extra_info.update(row)

    torch.manual_seed(0)
    return run


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    backends = {row["backend"] for row in rows}
    only = backends.pop() if len(backends) == 1 else None  # its name can then head the columns
    table = [[name.replace("ours", only or "ours") for name in COLUMNS]]
    for row in rows:
        table.append([
            row["shape"],
            row["op"] if only else f"{row['op']}, {row['backend']}",
            row["pass"],
            f"{row['reference_ms']:.2f}",
            f"{row['median_ms']:.2f}",
            f"{row['speedup']:.2f}x",
            f"{row['reference_peak_mib']:.2f}",
            f"{row['peak_mib']:.2f}",
        ])  # fmt: skip

    facts, rounds = measure.conditions(), min(row["rounds"] for row in rows)
    terminalreporter.section("mae_kernels against its reference")
    terminalreporter.write_line(
        f"{facts['device']}, {facts['threads']} threads, load {facts['load']} before the run, torch {facts['torch']}, "
        f"triton {facts['triton']}, float32 tensors; interleaved medians of {rounds} or more rounds"
    )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = [
            cell.ljust(width) if name in COLUMNS[:3] else cell.rjust(width)
            for cell, width, name in zip(line, widths, COLUMNS, strict=True)
        ]
        terminalreporter.write_line(" | ".join(cells).rstrip())
