"""Options, the hand-over of a row to pytest-benchmark, the tables at the end of a run, and its result file."""

import sys
from pathlib import Path

import pytest

from benchmarks import measure, record, shapes
from benchmarks.ceilings import measured as ceilings_of_this_machine

ROWS = pytest.StashKey[list[dict]]()
CEILINGS = pytest.StashKey[dict]()
COLUMNS = ("shape", "op", "pass", "reference ms", "ours ms", "of floor", "speed-up", "reference MiB", "ours MiB")
STEP_COLUMNS = ("shape", "contender", "ms", "images/s", "of matrix rate", "peak MiB", "saved MB/image", "launches",
                "syncs", "kB/image shipped")  # fmt: skip


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks of mae_kernels")
    on_gpu = measure.DEVICE.type == "cuda"
    sizes = ["tiny", "small", "cpu", "full"]
    group.addoption("--size", choices=sizes, default="small", help="small: minutes on two cores; tiny: interpreted")
    group.addoption("--rounds", type=int, default=10, help="at least; short calls get more, two seconds in all")
    group.addoption(
        "--compiled", default="ViT-B/16 N=256" if on_gpu else "", metavar="SHAPE",
        help="the reference is compiled too, at shapes whose names hold this",
    )  # fmt: skip
    group.addoption("--record", type=Path, metavar="FILE", help="write what was measured, as benchmarks/results holds")
    group.addoption("--contenders", default="abcCgdef" if on_gpu else "acgd", help="of the step")
    group.addoption("--step-dtypes", default="bfloat16" if on_gpu else "float32,bfloat16", help="of the step")
    group.addoption("--step-rounds", type=int, default=5, help="timed steps of each contender")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):  # before the plugin reads its options
    config.stash[ROWS], config.stash[CEILINGS] = [], {}
    config.option.benchmark_columns = config.option.benchmark_columns or ["median", "iqr", "min", "rounds"]


def pytest_generate_tests(metafunc):
    for fixture, table in (("op_shape", shapes.OPS), ("step_shape", shapes.STEP)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, table[metafunc.config.getoption("size")], ids=lambda shape: shape.id)
    if "contender" in metafunc.fixturenames:
        metafunc.parametrize("step_dtype", metafunc.config.getoption("step_dtypes").split(","))
        metafunc.parametrize("contender", metafunc.config.getoption("contenders"))


@pytest.fixture(scope="session")
def ceilings(request) -> dict:
    """Measured once, before the first row that is held against them."""
    found = ceilings_of_this_machine()
    request.config.stash[CEILINGS].update(found)
    return found


@pytest.fixture
def show(benchmark, request):
    """Hand a row over to pytest-benchmark, with samples that were interleaved with those of its contenders before."""

    def run(group: str, name: str, row: dict, samples: list[float]):
        benchmark.group, benchmark.name = group, name
        waiting = iter(samples)
        benchmark.pedantic(measure.replay, setup=lambda: ((next(waiting),), {}), rounds=len(samples))
        benchmark.extra_info.update(row)
        request.config.stash[ROWS].append(row)

    return run


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    facts, rows = record.conditions(), config.stash[ROWS]
    if not rows:
        return
    machine = (
        f"{facts['device']}, {facts['threads']} threads, load {facts['load']} before the run, torch {facts['torch']}, "
        f"triton {facts['triton']}"
    )
    for name, write in (("speedup", _write_ops), ("contender", _write_steps), ("host_us", _write_host)):
        chosen = [row for row in rows if name in row]
        if chosen:
            write(terminalreporter, chosen, machine)
    path = config.option.record
    if path:
        command = " ".join(["pytest", *(f"'{word}'" if " " in word else word for word in _arguments(path))])
        record.write(path, command=command, rows=rows, ceilings=config.stash[CEILINGS])
        terminalreporter.write_line(f"wrote {path}")


def _arguments(path: Path) -> list[str]:
    """Those of the command line that decide what is measured."""
    return [word for word in sys.argv[1:] if word not in ("--record", str(path), f"--record={path}")]


def _write_ops(reporter, rows, machine):
    if record.conditions()["kind"] == "interpreter":
        reporter.section("kernels in Triton's interpreter")
        checked = dict.fromkeys(f"{row['shape']}, {row['op']}" for row in rows if row["backend"] == "triton")
        reporter.write_line("What they take there says nothing about a GPU. As exact as PyTorch, forward and backward:")
        for name in checked:
            reporter.write_line(name)
        return
    ours = [row for row in rows if row["backend"] in measure.OURS]
    backends = {row["backend"] for row in ours}
    only = backends.pop() if len(backends) == 1 else None  # its name can then head the columns
    table = [[name.replace("ours", only or "ours") for name in COLUMNS]]
    for row in ours:
        table.append([
            row["shape"],
            row["op"] if only else f"{row['op']}, {row['backend']}",
            row["pass"],
            f"{row['reference_ms']:.3f}",
            f"{row['median_ms']:.3f}",
            f"{row['of_floor']:.0%}",
            f"{row['speedup']:.2f}x",
            *(f"{row[name]:.2f}" if name in row else "" for name in ("reference_peak_mib", "peak_mib")),
        ])  # fmt: skip
    reporter.section("mae_kernels against its reference")
    rounds = min(row["rounds"] for row in rows)
    reporter.write_line(
        f"{machine}, float32 tensors unless a row says otherwise; interleaved medians of {rounds} or more rounds; "
        "floor: the bytes at the rate of a large copy or the FLOPs at that of a large product, the longer"
    )
    _write_table(reporter, table, names=3)


def _write_host(reporter, rows, machine):
    table = [["op", "pass", "us", "op alone us", "of F.linear"]]
    for row in rows:
        of_linear = f"{row['host_us'] / row['linear_host_us']:.1f}x"
        operator = f"{row['operator_host_us']:.1f}"
        table.append([row["op"], row["pass"], f"{row['host_us']:.1f}", operator, of_linear])
    reporter.section("what a call costs the host")
    launched = "launches included" if measure.DEVICE.type == "cuda" else "allocations included, launches not"
    reporter.write_line(f"{machine}; medians, {launched}")
    _write_table(reporter, table, names=2)


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
