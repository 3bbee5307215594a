import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search('__version__ = "(.+)"', (here / "mae_kernels" / "__init__.py").read_text(encoding="utf-8"))[1]
readme = (here / "README.md").read_text(encoding="utf-8")
# Where the description is shown, the pages and pictures of this repository are not: their links become plain words.
description = re.sub(r"!?\[([^]]+)]\((?!https?:|#)[^)]+\)", r"\1", readme)

model = ["filelock", "matplotlib", "pillow", "safetensors", "scikit-learn", "scipy", "tensorboard", "tqdm", "tyro"]
multiband = ["imagecodecs", "tifffile"]  # TIFFs beyond 8-bit grey and colour, compressed ones too
video = ["av>=14.1"]  # from which on a frame knows its rotation
audio = ["soundfile"]
fast = ["simplejpeg"]
datasets = ["datasets>=4"]  # from which on it runs no scripts
bench = [*model, "pytest", "pytest-benchmark"]
test = [
    *bench, *multiband, *video, *audio, *datasets, *fast, "accelerate", "hypothesis", "mmasim", "onnxruntime",
    "onnxscript", "packaging", "peft", "pytest-xdist", "setuptools>=77", "transformers>=5.17",
]  # fmt: skip

setup(
    name="mae_kernels",
    version=version,
    description="Fused ops for masked-autoencoder training, and the thin MAE model that trains with them",
    long_description=description,
    long_description_content_type="text/markdown",
    author="The mae_kernels authors",
    license_expression="MIT",
    license_files=["LICENSE", "mae/fashion_mnist/LICENSE"],
    classifiers=[
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["mae_kernels", "mae_kernels.*", "mae", "mae.*"]),
    package_data={"": ["*.pyi", "py.typed"], "mae": ["fashion_mnist/*", "recipes/*"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11,<2.16",
        "triton>=3.6,<4; platform_system == 'Linux'",
        "einops>=0.8",
        "numpy",
    ],
    extras_require={
        "mae": model,
        "multiband": multiband,
        "video": video,
        "audio": audio,
        "datasets": datasets,
        "fast": fast,
        "bench": bench,
        "test": test,
        "dev": [*test, "mypy", "ruff"],
    },
)
