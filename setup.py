from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent

model = ["filelock", "matplotlib", "pillow", "safetensors", "scikit-learn", "scipy", "tensorboard", "tqdm", "tyro"]
multiband = ["imagecodecs", "tifffile"]  # TIFFs beyond 8-bit grey and colour, compressed ones too
video, audio = ["av>=14"], ["soundfile"]
fast = ["simplejpeg"]
datasets = ["datasets>=4"]  # from which on it runs no scripts
bench = [*model, "pytest", "pytest-benchmark"]
test = [
    *bench, *multiband, *video, *audio, *datasets, *fast, "accelerate", "hypothesis", "mmasim", "onnxruntime",
    "onnxscript", "peft", "pytest-xdist", "transformers>=5.17",
]  # fmt: skip

setup(
    name="mae_kernels",
    version="0.1.0",
    description="Fused ops for masked-autoencoder training, and the thin MAE model that trains with them",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["mae_kernels", "mae_kernels.*", "mae", "mae.*"]),
    package_data={"mae": ["fashion_mnist/*", "recipes/*"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11,<2.16",
        "triton>=3.6,<4; platform_system == 'Linux'",
        "einops>=0.8",
        "numpy",
    ],
    extras_require={
        "demo": model,
        "multiband": multiband,
        "video": video,
        "audio": audio,
        "datasets": datasets,
        "fast": fast,
        "bench": bench,
        "test": test,
        "dev": [*test, "ruff"],
    },
)
