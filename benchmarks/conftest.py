"""Options, the interleaved measurement of one row, and the table at the end of a run."""

from statistics import median, quantiles

import pytest
import torch

from benchmarks import measure, shapes

ROWS = pytest.StashKey[list[dict]]()
COLUMNS = ("shape", "op", "pass", "reference ms", "ours ms", "speed-up", "reference MiB", "ours MiB")
STEP_COLUMNS = ("shape", "contender", "ms", "images/s", "of matrix rate", "peak MiB", "saved MB/image", "launches",
                "syncs", "kB/image shipped")  # fmt: skip


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks of mae_kernels")
    group.addoption("--size", choices=["small", "cpu", "full"], default="small", help="small: minutes on two cores")
    group.addoption("--rounds", type=int, default=10, help="at least; short calls get more, two seconds in all")
    on_gpu = measure.DEVICE.type == "cuda"
    group.addoption("--contenders", default="abcCgdef" if on_gpu else "acgd", help="of the step")
    group.addoption("--step-dtypes", default="bfloat16" if on_gpu else "float32,bfloat16", help="of the step")
    group.addoption("--step-rounds", type=int, default=5, help="timed steps of each contender")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):  # before the plugin reads its options
    config.stash[ROWS], config.stash[measure.STEP_ROWS] = [], []
    config.option.benchmark_columns = config.option.benchmark_columns or ["median", "iqr", "min", "rounds"]


def pytest_generate_tests(metafunc):
    for fixture, table in (("op_shape", shapes.OPS), ("step_shape", shapes.STEP)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, table[metafunc.config.getoption("size")], ids=lambda shape: shape.id)
    if "contender" in metafunc.fixturenames:
        metafunc.parametrize("step_dtype", metafunc.config.getoption("step_dtypes").split(","))
        metafunc.parametrize("contender", metafunc.config.getoption("contenders"))


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
    facts = measure.conditions()
    machine = (
        f"{facts['device']}, {facts['threads']} threads, load {facts['load']} before the run, torch {facts['torch']}, "
        f"triton {facts['triton']}"
    )
    if config.stash[ROWS]:
        _write_ops(terminalreporter, config.stash[ROWS], machine)
    if config.stash[measure.STEP_ROWS]:
        _write_steps(terminalreporter, config.stash[measure.STEP_ROWS], machine)


def _write_ops(reporter, rows, machine):
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
    reporter.section("mae_kernels against its reference")
    rounds = min(row["rounds"] for row in rows)
    reporter.write_line(
        f"{machine}, float32 tensors unless a row says otherwise; interleaved medians of {rounds} or more rounds"
    )
    _write_table(reporter, table, names=3)


def _write_steps(reporter, rows, machine):
    table = [list(STEP_COLUMNS)]
    for row in rows:
        table.append([
            f"{row['shape']}, {row['dtype']}",
            row["contender"],
            f"{row['median_ms']:.0f}",
            f"{row['images_per_s']:.1f}",
            f"{row['mfu']:.0%}",
            f"{row['peak_mib']:.0f}",
            f"{row['saved_bytes_per_image'] / 1e6:.1f}",
            str(row["launches"]),
            str(row["host_syncs"]),
            f"{row['shipped_bytes_per_image'] / 1e3:.0f}",
        ])  # fmt: skip
    reporter.section("the whole training step")
    rates = {row["dtype"]: f"{row['matrix_tflops']:.2f} TFLOP/s in {row['dtype']}" for row in rows}
    reporter.write_line(
        f"{machine}; interleaved medians of {rows[0]['rounds']} steps; share of the rate of a large matrix product in "
        f"the same run, {', '.join(rates.values())}"
    )
    _write_table(reporter, table, names=2)


def _write_table(reporter, table, names):
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = [
            cell.ljust(width) if i < names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        reporter.write_line(" | ".join(cells).rstrip())
