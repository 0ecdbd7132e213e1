import re
from pathlib import Path

from setuptools import find_packages, setup

version = re.search(r'^__version__ = "(.+)"$', Path("linear_moe/__init__.py").read_text(), re.MULTILINE)[1]

extras = {
    "data": ["tokenizers>=0.20", "transformers>=5.0", "tqdm>=4.66"],
    "sft": ["datasets>=2.18", "transformers>=5.0"],
    "hf": ["safetensors>=0.4", "transformers>=5.0"],
    "eval": ["lm-eval>=0.4.8"],
    "muon": ["emerging-optimizers>=0.2"],
    "look": ["matplotlib>=3.9", "tensorboard>=2.17"],
    "gpu": ["transformer-engine[pytorch]>=2.0"],
    "peers": ["flash-linear-attention==0.6.0", "einops", "transformers>=5.6.2,<6"],  # what tests compare with
}
extras["gpu-peers"] = [*extras["peers"], "flash-qla==0.1.3", "tilelang"]  # what benchmarks compare with
extras["dev"] = [
    *extras["data"], *extras["hf"], *extras["look"], *extras["muon"], *extras["peers"],
    "pytest>=8.3", "pytest-xdist>=3.7",
    "ruff==0.17.5",
    "setuptools>=77",  # a test builds the wheel without a network
]  # fmt: skip

setup(
    name="linear-moe",
    version=version,
    description="Linear sequence mixers and Mixture-of-Memories for Megatron-Core",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    keywords=["linear attention", "state-space model", "mixture of memories", "mixture of experts", "Megatron"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    project_urls={
        "Paper: MoM": "https://arxiv.org/abs/2502.13685",
        "Paper: Linear-MoE": "https://arxiv.org/abs/2503.05447",
        "Megatron-LM": "https://github.com/NVIDIA/Megatron-LM",
    },
    python_requires=">=3.12",
    packages=find_packages(include=["linear_moe", "linear_moe.*"]),
    package_data={"": ["*.json"], "linear_moe": ["py.typed", "configs/**/*.yaml"]},
    entry_points={"console_scripts": ["linear-moe = linear_moe.commands:main"]},
    install_requires=[
        "megatron-core>=0.19.2,<0.21",
        "numpy",
        "psutil",  # megatron-core's checkpoint writer hangs without it and does not declare it
        "pyyaml>=6",
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
    ],
    extras_require=extras,
)
