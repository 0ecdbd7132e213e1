"""Every kernel compiles without a GPU, within the limits: the tool's quick run, and what it finds in bad kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.json"
    done = run("tools/kernel_report.py", "--quick", "--json", str(path))
    return done, json.loads(path.read_text())


def test_every_kernel(quick):
    done, _ = quick
    assert done.returncode == 0, done.stdout[done.stdout.rfind("\n\n") :] + done.stderr[-2000:]


def test_binaries(quick):
    done, found = quick
    assert {b["architecture"] for b in found["binaries"]} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    products = [b for b in found["binaries"] if b["kernel"] == "grouped.grouped_rows" and "bfloat16" in b["variant"]]
    expected = {"sm_90": ["wgmma"], "sm_100": ["tcgen05"], "gfx942": ["mfma"]}
    assert products and all(b["tensor_cores"] == expected[b["architecture"]] for b in products)
    assert all(b["registers"] > 0 and b["shared"] > 0 for b in products)
    assert "wgmma" in done.stdout


def test_floor_counts_products_and_bytes(quick):
    """The projections of MoM's rows: a token's k + shared rows, forward and for the input's gradient."""
    (floor,) = (f for f in quick[1]["floors"] if f["kernel"] == "grouped.grouped_rows")
    products = 2 * 2 * 3 * 1024 * (8 * 256)
    assert floor["flops_per_token"] == products and floor["launches"] == 2
    assert floor["bytes_per_token"] > 2 * (1024 + 3 * 8 * 256)
    assert floor["nanoseconds_per_token"] == pytest.approx(products / 790e12 * 1e9)


BAD = """
import os
import torch, triton, triton.language as tl
from linear_moe.measure.binary import Build, compile_all
from linear_moe.ops.triton.launch import kernel
from linear_moe.measure.kernel_report import problems

@kernel
def wrong(x, T):
    tl.store(x, nothing)

@kernel
def large(x, y, T, S, D: tl.constexpr):
    i = tl.arange(0, D)
    b_y = tl.zeros((D, D), tl.float32)
    for j in range(0, T):
        b_x = tl.load(x + j * D * D + i[:, None] * D + i[None, :])
        b_y = tl.dot(b_x, b_x, b_y)
    tl.store(y + i[:, None] * D + i[None, :] + S, b_y)

@kernel
def turned(x, y, T, D: tl.constexpr):
    i = tl.arange(0, D)
    p = i[:, None] * D + i[None, :]
    b_x = tl.load(x + p)
    b_z = tl.zeros((D, D), tl.float32)
    for j in range(0, T):
        b_y = tl.dot(b_x, tl.trans(b_x))  # of what is loaded
        if j > 1:
            b_y = tl.where(i[:, None] > j, 2 * b_y, 0)
        b_z += tl.dot(tl.trans(b_y.to(b_x.dtype)), b_x)
    tl.store(y + p, b_z)

class Dies(Build):
    def compile(self):
        os.abort()

class Hangs(Build):
    def compile(self):
        import time
        time.sleep(60)

x, y = (torch.empty(64, 256, 256, device="meta", dtype=d) for d in (torch.bfloat16, torch.float32))
launches = [(wrong, (1,), (x, 1), {}), (large, (1,), (x, y, 1, 1), {"D": 256, "num_warps": 4, "num_stages": 3})]
launches.append((turned, (1,), (x, y, 1), {"D": 64}))
builds = [Build(launches[0], "sm_80"), Build(launches[1], "sm_80"), Dies(launches[0], "sm_90")]
builds.append(Build(launches[2], "sm_90"))
late = Hangs(launches[0], "sm_90")
binaries = compile_all(builds) + compile_all([late], timeout=1)
for build, binary in zip([*builds, late], binaries):
    build.dtype = torch.bfloat16
    print(" | ".join(problems(build, binary)))
"""

NOT_IN_QUICK = """
from linear_moe.measure.binary import Build
from linear_moe.measure.dataflow import transposed_products
from linear_moe.measure.kernel_report import parts
from linear_moe.measure.workload import CASES, Shape, record, title

builds = {}
for case in CASES:
    if case.name not in parts(quick=True)[0].cases:
        for recorded in record(case, Shape(64, 64), "sm_90"):
            build = Build(recorded, "sm_90")
            builds[build.source.hash()] = build
for build in builds.values():
    print(title(build.kernel), *transposed_products(build.ttir()))
"""


def test_problems_are_found_and_cost_one_row_each(tmp_path):
    script = tmp_path / "bad.py"
    script.write_text(BAD)
    done = run(str(script))
    wrong, large, dies, transposed, hangs = done.stdout.strip().splitlines()
    assert "does not compile" in wrong and "nothing" in wrong
    assert "bytes a thread" in large and "shared memory" in large and "anew for values of S" in large
    assert "the compiler died" in dies
    assert transposed.startswith("multiplies the transpose of another product: b_z") and "|" not in transposed
    assert "longer than 1 s" in hangs


def test_no_kernel_multiplies_the_transpose_of_another_product(quick, tmp_path):
    """Triton 3.4 to 3.7 compiles that wrongly for sm_90. The dense cases are in the quick report."""
    assert all(b["transposed"] == [] for b in quick[1]["binaries"])
    script = tmp_path / "forms.py"
    script.write_text(NOT_IN_QUICK)
    done = run(str(script))
    kernels = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"gradients.key_gradients", "dplr.gradients", "titans.titans_backward", "ttt.ttt_acc_back"} <= {*kernels}
    assert [k for k in kernels if " " in k] == []
