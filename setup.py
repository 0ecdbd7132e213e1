from setuptools import find_packages, setup

extras = {
    "data": ["tokenizers>=0.20", "transformers>=5.0", "tqdm>=4.66"],
    "sft": ["datasets>=2.18", "transformers>=5.0"],
    "hf": ["safetensors>=0.4", "transformers>=5.0"],
    "eval": ["lm-eval>=0.4.8"],
    "look": ["matplotlib>=3.9", "tensorboard>=2.17"],
    "gpu": ["transformer-engine[pytorch]>=2.0"],
    "peers": ["flash-linear-attention==0.6.0", "einops", "transformers>=5.6.2,<6"],  # what tests compare with
}
extras["gpu-peers"] = [*extras["peers"], "flash-qla==0.1.3", "tilelang"]  # what benchmarks compare with
extras["dev"] = [
    *extras["data"], *extras["hf"], *extras["look"], *extras["peers"], "pytest>=8.3", "pytest-xdist>=3.7",
    "ruff==0.17.5",
]  # fmt: skip

setup(
    name="linear-moe",
    version="0.1.0",
    description="Linear sequence mixers and Mixture-of-Memories for Megatron-Core",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["linear_moe", "linear_moe.*"]),
    package_data={"linear_moe.measure": ["flops.json"], "linear_moe.ops.triton": ["tuning.json"]},
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
