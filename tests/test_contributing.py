"""CONTRIBUTING.md tells the truth: its map names what is there, imports go its way, every op has what it lists."""

import ast
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import dispatcher_calls
from faults import FAULTS

import mae
import mae_kernels
from benchmarks.work import BASE, CASES
from mae.__main__ import _COMMANDS
from mae_kernels import decompositions, reference

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CODE = ("mae_kernels", "mae", "benchmarks", "tests", "docs", "examples", "hub")


def text(place: Path | str) -> str:
    return (ROOT / place).read_text(encoding="utf-8")


# The map.


def named() -> list[Path]:
    """Files and folders of the map, in its order. What is indented lies in the folder that the last such line began."""
    found, folder = [], ROOT
    for line in re.search(r"^mae_kernels/.*?(?=^```)", PAGE, re.DOTALL | re.MULTILINE)[0].splitlines():
        first, *others = re.findall(r"(?<![\w/])(?:[\w/]+\.py|\w+/)(?![\w/])", line)
        if line.startswith(" "):
            found.append(folder / first)
        else:
            folder = ROOT / first
            found.append(folder)
        beside = [x.parent if x.is_file() else x for x in (found[-1],)]
        for name in others:
            places = [x / name for x in (*beside, folder, ROOT)]
            found.append(next((x for x in places if x.exists()), places[0]))
    return found


MAP = named()


def test_the_map_names_what_is_there():
    assert [str(x) for x in MAP if not x.exists()] == []
    folders = {f.parent for name in CODE for f in (ROOT / name).rglob("*.py") if "layout" not in f.parts}
    loose = {f for name in ("mae_kernels", "mae") for f in (ROOT / name).glob("*.py") if f.stem not in OPS}
    missing = (folders | loose) - {*MAP} - {ROOT / name / "__init__.py" for name in CODE}
    assert sorted(map(str, missing)) == []


# The direction of imports.


def modules(path: Path) -> Iterator[str]:
    """The modules of this repository that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(text(path))):
        if isinstance(node, ast.Import):
            names = [x.name for x in node.names]
        elif isinstance(node, ast.ImportFrom):
            folder = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*folder, *filter(None, [node.module])])
            within = [f"{module}.{x.name}" for x in node.names]
            names = [x for x in within if is_module(x)] or [module]
        else:
            continue
        yield from (x for x in names if x.split(".")[0] in CODE)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_imports_go_up_the_map():
    rooms = [x.stem for x in MAP if x.parent == ROOT / "mae"]  # __main__ is the last of them
    wrong = []
    for path in (ROOT / "mae").rglob("*.py"):
        room = path.relative_to(ROOT / "mae").parts[0].removesuffix(".py")
        if room == "__init__":
            continue  # it names every room, and imports them when they are asked for
        for module in modules(path):
            top, *parts = module.split(".")
            allowed = top == "mae_kernels" or (top == "mae" and parts and rooms.index(parts[0]) <= rooms.index(room))
            wrong += [] if allowed else [f"{path.relative_to(ROOT)} imports {module}"]
    for path in (ROOT / "mae_kernels").rglob("*.py"):
        may_take_kernels = path.parent.name == "kernels" or path.stem == "registration"
        for module in modules(path):
            of_kernels = module.startswith("mae_kernels.kernels")
            allowed = module.startswith("mae_kernels") and (may_take_kernels or not of_kernels)
            wrong += [] if allowed else [f"{path.relative_to(ROOT)} imports {module}"]
        wrong += re.findall(r"^ *(?:from|import) mae_kernels\b.*", text(path), re.M)
    assert wrong == []


# The list for those who add an op.

REGISTERED = {*torch.ops.mae_kernels}
OPS = sorted(f.stem for f in (ROOT / "mae_kernels").glob("*.py") if f.stem in REGISTERED)
FUNCTIONS = {op: {"masking": "random_masking"}.get(op, op) for op in OPS}  # masking.py has several, for one op
RECORDED = [json.loads(f.read_text(encoding="utf-8"))["rows"] for f in (ROOT / "tests" / "recorded").glob("*.json")]


def has_kernels(op: str) -> bool:
    return "has_kernels=False" not in text(f"mae_kernels/{op}.py")


def has_a_function(op: str, place: str) -> None:
    function = getattr(mae_kernels, FUNCTIONS[op])
    assert Path(inspect.getfile(function)) == ROOT / place
    for part in ("Args:", "``[N", "Returns:", "Raises:", "Equivalent PyTorch"):
        assert part in function.__doc__, part
    assert re.search(rf'register_op\(\s*"{op}\(', text(place))


def is_public(op: str, place: str) -> None:
    assert FUNCTIONS[op] in mae_kernels.__all__


def has_a_definition(op: str, place: str) -> None:
    assert Path(inspect.getfile(getattr(reference, FUNCTIONS[op]))) == ROOT / place


def has_a_kernel(op: str, place: str) -> None:
    if has_kernels(op):
        assert "@triton.jit" in text(place)
        assert f"from .{op} import {op}" in text("mae_kernels/kernels/__init__.py")


def is_decomposed(op: str, place: str) -> None:
    assert op in decompositions.BY_NAME or op == "random_resized_crop"


def has_arguments_for_opcheck(op: str, place: str) -> None:
    called = {call[0]._qualified_op_name.removeprefix("mae_kernels::") for call in dispatcher_calls()}
    assert {name for name in REGISTERED if name.startswith(op)} <= called


def has_tests(op: str, place: str) -> None:
    has_gradient = "= differentiable(" in text(f"mae_kernels/{op}.py")
    assert all(word in text(place) for word in ("reference", "backend", *(["gradcheck"] if has_gradient else [])))


def refuses_wrong_calls(op: str, place: str) -> None:
    assert any(f'"{FUNCTIONS[op]}: ' in f.read_text(encoding="utf-8") for f in ROOT.glob(place))


def has_faults(op: str, place: str) -> None:
    files = [f"mae_kernels/{op}.py", *([f"mae_kernels/kernels/{op}.py"] if has_kernels(op) else [])]
    assert {*files} <= {fault.file for fault in FAULTS}


def is_recorded(op: str, place: str) -> None:
    assert RECORDED
    if has_kernels(op):
        assert all(any(row["case"].startswith(FUNCTIONS[op]) for row in rows) for rows in RECORDED)


def is_measured(op: str, place: str) -> None:
    assert FUNCTIONS[op] in {make(BASE).op for make in CASES.values()}


def is_in_a_table(op: str, place: str) -> None:
    assert re.search(rf"^\| `[^|]*\b{FUNCTIONS[op]}\b", text(place), re.MULTILINE)


CHECKS = {
    "mae_kernels/OP.py": has_a_function,
    "mae_kernels/__init__.py": is_public,
    "mae_kernels/reference.py": has_a_definition,
    "mae_kernels/kernels/OP.py": has_a_kernel,
    "mae_kernels/decompositions.py": is_decomposed,
    "tests/cases.py": has_arguments_for_opcheck,
    "tests/test_OP.py": has_tests,
    "tests/test_bad_*.py": refuses_wrong_calls,
    "tests/faults.py": has_faults,
    "tests/recorded": is_recorded,
    "benchmarks/work.py": is_measured,
    "docs/ops.md": is_in_a_table,
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("place", CHECKS)
def test_every_op_has_what_the_list_says(place, op):
    CHECKS[place](op, place.replace("OP", op))


def test_the_list_names_what_is_checked_and_every_op_is_walked():
    section = PAGE.partition("## To add an op")[2].partition("\n## ")[0]
    assert re.findall(r"^- `(.+?)`: ", section, re.M) == [*CHECKS]
    assert len(OPS) > 6
    parts = set(re.findall(r'register_op\(\s*"(\w+)', text("mae_kernels/products.py")))  # of ops, and no ops to call
    assert {name for name in REGISTERED - parts if not name.startswith((*OPS,))} == set()


# The rest of the page, and the changelog.

CHANGELOG = text("CHANGELOG.md")


def test_commands_and_files_of_both_pages_exist():
    makefile = text("Makefile")
    for page in (PAGE, CHANGELOG):
        targets = re.findall(r"(?:^|`)make ([\w-]+)", page, re.MULTILINE)
        assert [x for x in targets if not re.search(rf"^([\w-]+ )*{x}( [\w-]+)*:", makefile, re.MULTILINE)] == []
        assert [x for x in re.findall(r"python -m ([\w.]+)", page) if not is_module(x)] == []
        places = re.findall(r"`((?:benchmarks|docs|examples|mae|mae_kernels|tests)/[^`]+)`", page)
        assert [x for x in places if "OP" not in x and not any(ROOT.glob(x))] == []


def test_the_changelog_has_every_public_name_and_command():
    assert re.search(rf"(^## \[|This is what ){re.escape(mae_kernels.__version__)}\b", CHANGELOG, re.MULTILINE)
    said = set(re.findall(r"`(?:python -m mae )?(\w+)`", CHANGELOG))
    assert sorted({*mae_kernels.__all__, *_COMMANDS} - said) == []
    assert {name for name in said if name.startswith("mae_vit")} < {*mae.MODELS}
