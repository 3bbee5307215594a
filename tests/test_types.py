"""Types: everything public has them, they can be read while the program runs, and a typed program runs."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, get_args, get_type_hints

import pytest
import typed_program

import mae
import mae_kernels
from mae.training import optimizers, step
from mae_kernels import decompositions, integrations, nn, reference

MODULES = [mae_kernels, nn, reference, decompositions, integrations, mae]
SPECIAL = ("__init__", "__call__", "__enter__", "__exit__")  # the others are Python's or dataclasses' own


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Functions, and methods of classes, that a module offers by name."""
    for name in getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]:
        member = getattr(module, name)
        if not getattr(member, "__module__", "").startswith(("mae.", "mae_kernels.")):
            continue
        if isinstance(member, FunctionType):
            yield f"{module.__name__}.{name}", member
        for own, attribute in vars(member).items() if isinstance(member, type) else ():
            attribute = attribute.fget if isinstance(attribute, property) else attribute
            attribute = getattr(attribute, "__func__", attribute)  # of class and static methods
            if isinstance(attribute, FunctionType) and (not own.startswith("_") or own in SPECIAL):
                yield f"{module.__name__}.{name}.{own}", attribute


@pytest.mark.parametrize(
    "module", [mae_kernels, nn, reference, decompositions, integrations, mae], ids=lambda m: m.__name__
)
def test_everything_public_has_types(module):
    found = dict(public(module))
    assert len(found) >= 2
    untyped = []
    for name, function in found.items():
        hints = get_type_hints(inspect.unwrap(function))
        wanted = [x for x in inspect.signature(function).parameters if x not in ("self", "cls")] + ["return"]
        untyped += [f"{name}: {x}" for x in wanted if x not in hints]
    assert untyped == []


@pytest.mark.parametrize("package", [mae, mae_kernels])
def test_type_checkers_are_told_that_there_are_types(package):
    assert (Path(package.__file__).parent / "py.typed").is_file()


def test_choices_are_those_of_the_tables():
    assert get_args(step.StrategyName) == tuple(step._STRATEGIES)
    assert get_args(optimizers.OptimizerName) == tuple(optimizers.OPTIMIZERS)


def test_a_typed_program_runs():
    typed_program.right_calls()
