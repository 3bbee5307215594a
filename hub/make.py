"""Write mae_kernels as a project of Hugging Face's kernel-builder: ``python hub/make.py FOLDER [--owner NAME]``.

The folder also holds what kernel-builder builds from it, so that ``kernels`` loads it as it is. Python itself suffices.
"""

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mae_kernels"
BYTECODE = shutil.ignore_patterns("__pycache__")
BACKENDS = ("cpu", "cuda", "metal", "rocm", "xpu")  # where there is no Triton the ops are plain PyTorch


def write(folder: Path, owner: str) -> None:
    """Write the project into a new folder, for the repository ``owner``/mae-kernels of the Hub.

    Raises:
        FileExistsError: the folder exists.
    """
    facts = _facts(owner)
    shutil.copytree(ROOT / "hub/layout", folder, ignore=BYTECODE)
    for path in filter(Path.is_file, folder.rglob("*")):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"{{(\w+)}}", lambda match: facts[match[1]], text), encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder)
    shutil.copytree(PACKAGE, folder / "torch-ext/mae_kernels", ignore=BYTECODE)
    for backend in BACKENDS:
        _build(folder / f"build/torch-{backend}", backend, facts)
    shutil.copy(folder / "CARD.md", folder / "build")  # the README of the Hub's repository


def _facts(owner: str) -> dict[str, str]:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    package = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    return {
        "backends": json.dumps(BACKENDS),
        "description": ast.get_docstring(ast.parse(package)),
        "license": re.search(r'license_expression="(.*)"', setup)[1].lower(),
        "repo_id": f"{owner}/mae-kernels",
        "torch": re.search(r'"(torch>.*)"', setup)[1],
        # kernels counts major versions; 0 promises nothing yet
        "version": re.search(r'__version__ = "(\d+)\.', package)[1],
    }


def _build(folder: Path, backend: str, facts: dict[str, str]) -> None:
    shutil.copytree(PACKAGE, folder, ignore=BYTECODE)
    files = {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(filter(Path.is_file, folder.rglob("*")))
    }
    sources = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8]
    metadata = {
        "name": "mae-kernels",
        "id": f"_mae_kernels_{backend}_{sources}",  # kernels imports the package under this name, that of its ops too
        "version": int(facts["version"]),
        "license": facts["license"],
        "python-depends": ["einops"],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": files},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write, a folder that does not exist")
    parser.add_argument("--owner", default="OWNER", help="user or organisation of the Hub that will publish it")
    arguments = parser.parse_args()
    write(arguments.folder, arguments.owner)


if __name__ == "__main__":
    main()
