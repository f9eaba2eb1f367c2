"""Packaging: metadata, extras and the commands in the order of the pipeline."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "nnssl_ext" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

COMMANDS = (
    "convert",
    "extract_fingerprint",
    "plan_experiment",
    "preprocess",
    "plan_and_preprocess",
    "train",
    "plan_finetuning",
    "env",
    "evaluate",
    "compare",
    "report",
    "features",
    "cluster",
    "register",
    "demo",
)

setup(
    name="nnssl_ext",
    version=VERSION,
    description="Self-configuring self-supervised pretraining and fine-tuning for nnU-Net",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["nnssl_ext", "nnssl_ext.*", "dataset_conversion", "dataset_conversion.*"]),
    package_data={"nnssl_ext.reports": ["templates/*"], "nnssl_ext": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.4,!=2.9.*",
        "nnunetv2>=2.8.1,<3",
        "dynamic-network-architectures>=0.4.4",
        "batchgenerators>=0.25.1",
        "batchgeneratorsv2>=0.3.2",
        "SimpleITK>=2.3",
        "blosc2>=3.0",
        "acvl-utils>=0.2.3",
        "numpy>=1.26",
        "scipy>=1.11",
        "pydantic>=2.7",
        "typing_extensions>=4.10",
        "rich>=13",
        "tensorboard>=2.15",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "scikit-learn>=1.3",
        "monai>=1.4",
    ],
    extras_require={
        "cluster": ["dask>=2024.1", "distributed>=2024.1", "dask-jobqueue>=0.8"],
        "hub": ["huggingface_hub>=0.23", "safetensors>=0.4"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.11",
            "mypy>=1.15",
            "import-linter>=2.1",
            "hypothesis>=6.100",
            "dask>=2024.1",
            "distributed>=2024.1",
            "huggingface_hub>=0.23",
            "safetensors>=0.4",
        ],
    },
    entry_points={"console_scripts": [f"nnssl_{name} = nnssl_ext.cli.{name}:main" for name in COMMANDS]},
)
