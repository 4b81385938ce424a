"""vocab_parallel_kl against ModelOpt's loss for Megatron-Core, in a process of its own: importing it takes seconds."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_zeda.distillation import vocab_parallel_kl

pytestmark = pytest.mark.slow

THEIRS = """
import sys
from types import SimpleNamespace

import torch
from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

student, teacher = torch.load(sys.argv[1])
found = {}
for reverse in (False, True):
    for temperature in (1.0, 2.0):
        config = SimpleNamespace(tensor_model_parallel_size=1)
        logits = student.clone().requires_grad_()
        loss = LogitsKLLoss(config, temperature=temperature, reverse=reverse)(logits, teacher)[0]  # [s, b, V] -> [b, s]
        loss.sum().backward()
        found[reverse, temperature] = (loss.detach().t(), logits.grad)
torch.save(found, sys.argv[2])
"""


def test_values_and_gradients_are_those_of_modelopt(tmp_path: Path) -> None:
    if importlib.util.find_spec("modelopt") is None:
        pytest.skip("nvidia-modelopt is not installed")
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 2, 37, generator=generator) * 3 for _ in range(2))
    given, found = tmp_path / "logits.pt", tmp_path / "found.pt"
    torch.save((student, teacher), given)
    subprocess.run([sys.executable, "-c", THEIRS, str(given), str(found)], check=True, capture_output=True)
    for (reverse, temperature), (values, gradient) in torch.load(found).items():
        logits = student.clone().requires_grad_()
        kl = vocab_parallel_kl(logits, teacher, reverse=reverse, temperature=temperature)
        kl.sum().backward()
        torch.testing.assert_close(kl, values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits.grad, gradient, rtol=1e-4, atol=1e-6)
