"""What mae needs beyond the ops, named where it is missing."""

from importlib.util import find_spec


def require(*modules: str) -> None:
    """Refuse to go on without these packages.

    Raises:
        ModuleNotFoundError: which are missing, and the command that installs them.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"mae needs {', '.join(missing)}, which pip install 'mae_kernels[mae]' installs",
            name=missing[0],
        )
