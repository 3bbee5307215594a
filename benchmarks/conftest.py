"""Options, the hand-over of rows to pytest-benchmark and to a result file, and the tables at the end of a run."""

import copy
from pathlib import Path

import pytest

from benchmarks import ceilings as ceilings_of_this_machine
from benchmarks import measure, record, work

ROWS = pytest.StashKey[list[dict]]()
KERNELS = pytest.StashKey[set[str]]()


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks of mae_kernels")
    on_gpu = measure.DEVICE.type == "cuda"
    group.addoption("--size", choices=[*work.OP_SHAPES], default="small",
                    help="small: minutes on two cores; tiny: interpreted")  # fmt: skip
    group.addoption("--rounds", type=int, default=10, help="at least; short calls get more, two seconds in all")
    group.addoption("--max-rounds", type=int, default=500, help="at most, of an op")
    group.addoption("--compiled", default="ViT-B/16 N=256" if on_gpu else "", metavar="SHAPE",
                    help="the reference is compiled too, at shapes whose names hold this")  # fmt: skip
    group.addoption("--record", type=Path, metavar="FILE",
                    help="append each row, the moment it is measured; a folder: to this machine's file")  # fmt: skip
    group.addoption("--contenders", default="abcCgdef" if on_gpu else "acgd", help="of the step")
    group.addoption("--step-dtypes", default="bfloat16" if on_gpu else "float32,bfloat16", help="of the step")
    group.addoption("--step-rounds", type=int, default=5, help="timed steps of each contender")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):  # before the plugin reads its options
    config.stash[ROWS], config.stash[KERNELS] = [], set()
    config.option.benchmark_columns = config.option.benchmark_columns or ["median", "iqr", "min", "rounds"]
    path = config.option.record
    if path and path.is_dir():
        config.option.record = path / f"{record.name()}.jsonl"


def pytest_generate_tests(metafunc):
    size = metafunc.config.getoption("size")
    for fixture, table in (("op_shape", work.OP_SHAPES), ("step_shape", work.STEP_SHAPES)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, table[size], ids=lambda shape: shape.id)
    if "step_dtype" in metafunc.fixturenames:
        metafunc.parametrize("step_dtype", metafunc.config.getoption("step_dtypes").split(","))


@pytest.fixture(scope="session")
def ceilings(request) -> dict:
    """Measured once, before the first row that is held against them."""
    found = ceilings_of_this_machine.measured()
    _append(request.config, ceilings=found)
    return found


@pytest.fixture
def hand_over(benchmark, request):
    """Hand a row over: its samples, interleaved with those of its contenders, to pytest-benchmark's table."""

    def run(group: str, name: str, samples: list[float], row: dict):
        entry = copy.copy(benchmark)  # a test has one fixture, and as many rows as contenders
        entry.group, entry.name, entry.fullname, entry.extra_info = group, name, f"{group}, {name}", row
        stats = entry._make_stats(iterations=1)
        for seconds in samples:
            stats.update(seconds)
        benchmark._mode = "hand_over"  # else the plugin warns that the fixture was not used
        request.config.stash[ROWS].append(row)
        for kernel in measure.compiled_kernels(except_for=request.config.stash[KERNELS]):
            _append(request.config, kernel=kernel)
        _append(request.config, row=row)

    return run


def _append(config, **line) -> None:
    path = config.option.record
    if path:
        record.begin(path, record.command("pytest"))
        record.append(path, **line)


# Title, caption, number of columns that are names, and how a row fills each; by a field that only such rows have.
TABLES = {
    "speedup": (
        "mae_kernels against its reference",
        "interleaved medians; floor: bytes at a large copy's rate or FLOPs at a large product's; clone: as many bytes",
        3,
        {"shape": "{shape}", "op": "{op}", "pass": "{pass}", "reference ms": "{reference_ms:.3f}",
         "{backend} ms": "{median_ms:.3f}", "of floor": "{of_floor:.0%}", "of clone": "{of_clone:.0%}",
         "speed-up": "{speedup:.2f}x", "reference MiB": "{reference_peak_mib:.2f}", "{backend} MiB": "{peak_mib:.2f}"},
    ),
    "contender": (
        "the whole training step",
        "interleaved medians; share of the rate of a large matrix product in the same run",
        2,
        {"shape": "{shape}, {dtype}", "contender": "{contender}", "ms": "{median_ms:.0f}",
         "images/s": "{images_per_s:.1f}", "of matrix rate": "{mfu:.0%} of {matrix_tflops:.2f} TFLOP/s",
         "peak MiB": "{peak_mib:.0f}", "saved bytes/image": "{saved_bytes_per_image:,.0f}", "launches": "{launches}",
         "syncs": "{host_syncs}", "shipped bytes/image": "{shipped_bytes_per_image:,}"},
    ),
    "host_us": (
        "what a call costs the host",
        "medians; launches included on a GPU, not elsewhere",
        2,
        {"op": "{op}", "pass": "{pass}", "us": "{host_us:.1f}", "op alone us": "{operator_host_us:.1f}",
         "of F.linear": "{of_linear:.1f}x"},
    ),
}  # fmt: skip
INTERPRETED = (
    "kernels in Triton's interpreter",
    "what they take there says nothing about a GPU; each is as exact as PyTorch, forward and backward",
    3,
    {"shape": "{shape}", "op": "{op}", "pass": "{pass}"},
)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    facts, rows = record.conditions(), config.stash[ROWS]
    tables = TABLES | ({"speedup": INTERPRETED} if facts["kind"] == "interpreter" else {})
    for field, (title, caption, names, columns) in tables.items():
        for backend in [*measure.OURS, None]:  # of ops and hosts, of steps
            chosen = [row for row in rows if field in row and row.get("backend") == backend]
            if chosen:
                terminalreporter.section(title)
                terminalreporter.write_line(
                    f"{facts['device']}, {facts['threads']} threads, load {facts['load']} before the run, torch "
                    f"{facts['torch']}, triton {facts['triton']}; {caption}"
                )
                header = [name.format(backend=backend) for name in columns]
                _write_table(terminalreporter, [header, *(_cells(columns, row) for row in chosen)], names)
    if rows and config.option.record:
        terminalreporter.write_line(f"wrote {config.option.record}")


def _cells(columns: dict[str, str], row: dict) -> list[str]:
    unmeasured = dict.fromkeys(("reference_peak_mib", "peak_mib"), float("nan"))  # of a backward alone
    return [form.format_map(unmeasured | row).replace("nan", "") for form in columns.values()]


def _write_table(reporter, table: list[list[str]], names: int) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = [
            cell.ljust(width) if i < names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        reporter.write_line(" | ".join(cells).rstrip())
