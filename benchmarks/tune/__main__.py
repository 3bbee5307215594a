"""Tiles of every kernel, searched for a chip and written into the library's table: ``python -m benchmarks.tune``.

Each launch of the inspector, and a few more of other models, is a shape class. Tiles around the rule's are compiled for
the chip, without a GPU; what spills, does not fit or loses tensor cores or wide accesses is dropped, and a model ranks
the rest. On a GPU the best few are timed against the rule's tiles, which stay unless others are faster outside the
noise. Without one ``--predict`` writes what the model says, marked as such, and never over a measured entry.

Predict under the oldest Triton that the library supports: of 3.6 to 3.9 its compiler takes the most registers.
"""

import argparse
import datetime
import os
import sys
import time
from dataclasses import astuple
from pathlib import Path

import torch
import triton

from benchmarks import measure, record
from benchmarks.tune.prediction import CHIPS
from benchmarks.tune.search import by_model, searches, specimens
from benchmarks.tune.table import PREDICTED, Entry, rewritten
from benchmarks.tune.timing import by_clock
from mae_kernels.kernels import chips, tuned


def main(argv: list[str] | None = None) -> None:
    names = list(dict.fromkeys(specimen.kernel for specimen in specimens()))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--predict", action="store_true", help="write what the model says, without a GPU")
    parser.add_argument("--chip", choices=CHIPS, help="chip to predict for; on a GPU it is the machine's own")
    parser.add_argument("--kernel", action="append", choices=names, metavar="NAME", help="only this; repeatable")
    parser.add_argument("--seconds", type=float, default=480, help="time on a GPU, by default %(default)s")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--out", type=Path, default=Path(tuned.__file__), help="the table, by default the library's")
    parser.add_argument("--json", type=Path, help="a result file as well")
    options = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.exit(1, "TRITON_INTERPRET is set, and interpreted kernels are not compiled; unset it\n")
    if not options.predict and not torch.cuda.is_available():
        parser.exit(1, "PyTorch sees no GPU on this machine: nothing was tuned; --predict asks the model instead\n")
    chip = options.chip or ("sm_90" if options.predict else chips.chip_of(measure.DEVICE))
    if not options.predict and chip != chips.chip_of(measure.DEVICE):
        parser.error(f"--chip {chip} can only be predicted here: the GPU is tiled as {chips.chip_of(measure.DEVICE)}")
    if chip not in CHIPS:
        parser.exit(1, f"there is no model of {chip}: nothing was tuned\n")

    start = time.monotonic()
    wanted = [i for i, specimen in enumerate(specimens()) if specimen.kernel in (options.kernel or names)]
    found = searches(wanted, chip, options.workers)
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    device = PREDICTED if options.predict else torch.cuda.get_device_name()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    entries, rows = [], []
    for i, search in enumerate(found):
        left = start + options.seconds - time.monotonic()
        if left <= 0 and not options.predict:
            print(f"the time is up: {len(found) - i} of {len(found)} classes stay as they are")
            break
        share = left / (len(found) - i)
        tiles, seconds, rule_seconds = by_model(search) if options.predict else by_clock(search, share)
        specimen, limits = search.specimen, CHIPS[chip]
        floor = max(specimen.bytes / (limits.bandwidth * 1e3), specimen.flops / (limits.tflops * 1e6))
        times = (seconds * 1e6, rule_seconds * 1e6, floor)
        entries.append(Entry(search.key, tiles, specimen.variant, *times, device, today))
        rule = search.survivors[0][0]
        rows.append({
            "kernel": specimen.kernel, "variant": specimen.variant, "chip": chip, "source": device,
            "tiles": vars(tiles), "rule_tiles": vars(rule), "us": times[0], "rule_us": times[1], "floor_us": floor,
        })  # fmt: skip
        said = "rule" if tiles == rule else f"rule: {astuple(rule)}"
        line = f"{specimen.kernel:29}{specimen.variant:43}{astuple(tiles)!s:28}"
        print(f"{line}{times[0]:8.1f}{times[1]:8.1f}{floor:8.1f}  {said}", flush=True)
    text = (options.out if options.out.exists() else Path(tuned.__file__)).read_text(encoding="utf-8")
    options.out.write_text(rewritten(text, entries), encoding="utf-8")
    print(f"wrote {options.out}: tiles, then µs, those of the rule's tiles, and the floor; {device}, {today}")
    if options.json:
        command = " ".join(["python -m benchmarks.tune", *(sys.argv[1:] if argv is None else argv)])
        kind = {"kind": "prediction" if options.predict else "tuning"}
        record.write(options.json, command=command, rows=rows, **kind)


if __name__ == "__main__":
    main()
