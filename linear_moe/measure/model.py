"""A whole model on the device against the same on the CPU: logits and the gradient of every parameter.

The CPU's side runs in a process that sees no GPU, because Megatron asks only once whether there is one:
`python -m linear_moe.measure.model FILE SEED KIND`.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from linear_moe import build_model
from linear_moe.mcore.configs import CONFIGS, read_config

from .compare import verdict

CONFIG = CONFIGS / "tiny.yaml"
TOKENS = 100
CHOOSES = ("num-experts", "moe-", "mom-")  # in 16 bits near ties go another way, and a token to another expert
# kind -> dtype and limits, of logits and of gradients
KINDS = {"float32": (torch.float32, (1e-4, 1e-3)), "bfloat16": (torch.bfloat16, (2e-2, 5e-2))}


def run_model(kind, dtype, seed, state=None):
    """(state, {"logits", "d<parameter>": float64 tensors on the CPU}) in that dtype; kind: of KINDS."""
    config = read_config(CONFIG)
    if kind == "bfloat16":
        config = {name: value for name, value in config.items() if not name.startswith(CHOOSES)}
    model = build_model(config, use_cpu_initialization=True, transformer_impl="local", seed=seed)
    if state is None:  # what both sides can hold exactly
        model = model.to(KINDS[kind][0])
        state = {name: x.cpu() for name, x in model.state_dict().items() if torch.is_tensor(x)}
    model.load_state_dict(state, strict=False)
    model = model.to(dtype)
    device = next(model.parameters()).device
    tokens = torch.randint(512, (2, TOKENS), generator=torch.Generator().manual_seed(seed)).to(device)
    places = torch.arange(TOKENS, device=device).expand(2, TOKENS)
    logits = model(tokens, places, None)
    model(tokens, places, None, labels=tokens).float().mean().backward()
    found = {"logits": logits} | {f"d{name}": x.grad for name, x in model.named_parameters()}
    return state, {name: x.detach().double().cpu() for name, x in found.items()}


def check_model(kind, seed):
    """A result of a check."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cpu.pt"
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-m", __name__, str(file), str(seed), kind]
        subprocess.run(command, env=environment, check=True)
        state, expected = torch.load(file, weights_only=True)
    _, found = run_model(kind, KINDS[kind][0], seed, state)
    return verdict(found, expected, KINDS[kind][1])


if __name__ == "__main__":
    file, seed, kind = sys.argv[1:]
    torch.save(run_model(kind, torch.float32, int(seed)), file)
