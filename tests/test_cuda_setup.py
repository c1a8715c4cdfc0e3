"""What a CUDA run chooses before it starts, with the GPU's answers made up: no GPU is needed."""

import sys
import types

import pytest
import torch
import torch.nn.attention

import train_gpt
from train_gpt import SpeedrunError, activate_flash_attention


class Backends:
    """Stands in for torch's registry: each version is missing, broken, wrong or right."""

    def __init__(self, monkeypatch, capability: int, **versions: object):
        self.versions, self.active = versions, None
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
        monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", self.activate)
        monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", self.restore)
        monkeypatch.setattr(train_gpt, "try_attention", self.attention)
        monkeypatch.setattr(train_gpt, "provide_flash_attention_3", lambda: None)

    def activate(self, version: str) -> None:
        if version not in self.versions:
            raise ModuleNotFoundError(f"No module named '{version}'")
        self.active = version

    def restore(self, _raise_warn: bool = True) -> None:
        self.active = None

    def attention(self) -> list[torch.Tensor]:
        result = self.versions.get(self.active, 1.0)
        if isinstance(result, Exception):
            raise result
        return [torch.full((4,), result)] * 4


@pytest.mark.parametrize(
    ("capability", "versions", "active"),
    [
        (9, {"FA3": 1.001, "FA4": 1.0}, "FA3"),
        (9, {"FA4": 1.0}, "FA4"),
        (9, {"FA3": SystemError("undefined symbol"), "FA4": 1.0}, "FA4"),
        (9, {"FA3": 1.5, "FA4": 1.0}, "FA4"),  # a window or scale that is not passed on
        (9, {"FA3": float("nan"), "FA4": 1.0}, "FA4"),
        (9, {"FA4": ValueError("too many values to unpack (expected 2)")}, None),
        (10, {"FA3": 1.0, "FA4": 1.0}, "FA4"),
        (8, {"FA3": 1.0, "FA4": 1.0}, None),
        (12, {"FA4": 1.0}, None),
    ],
)
def test_the_fastest_attention_that_works_is_taken(monkeypatch, capability, versions, active):
    """Catches: a FlashAttention that imports but fails at its first call or computes something else, which ended runs
    in their warm-up; one that stays active after it failed; one for another GPU; a quiet fall back on Hopper."""
    backends = Backends(monkeypatch, capability, **versions)
    said = activate_flash_attention()
    assert backends.active == active
    assert said.startswith(active or "FA2 of torch")
    loud = active is None and capability in (9, 10)
    assert ("SLOW ON THIS GPU" in said) == ("requirements-gpu.txt" in said) == loud
    for version, result in versions.items():
        if loud and isinstance(result, Exception):
            assert f"{version}: {type(result).__name__}: {result}" in said


def test_an_attention_that_is_asked_for_and_fails_is_an_error(monkeypatch):
    backends = Backends(monkeypatch, 9, FA3=1.0, FA4=ValueError("too many values"))
    with pytest.raises(SpeedrunError, match="--attention FA4: FA4: ValueError: too many values"):
        activate_flash_attention("FA4")
    assert backends.active is None
    assert activate_flash_attention("FA2") == "FA2 of torch"
    with pytest.raises(SpeedrunError, match="FA3: RuntimeError: for compute capability"):
        Backends(monkeypatch, 12)
        activate_flash_attention("FA3")


def test_flash_attention_3_comes_from_the_package_kernels(monkeypatch):
    """Catches: the names under which torch looks for it. The package itself is made up."""
    fetched = types.ModuleType("flash_attn3")
    fetched._ops = types.SimpleNamespace(ops="its operators")
    package = types.ModuleType("kernels")
    package.get_kernel = lambda name, version: fetched
    monkeypatch.setitem(sys.modules, "kernels", package)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    monkeypatch.setattr(torch.ops, "flash_attn_3", None, raising=False)
    train_gpt.provide_flash_attention_3()
    assert sys.modules["flash_attn_interface"] is fetched
    assert torch.ops.flash_attn_3 == "its operators"
    monkeypatch.setitem(sys.modules, "kernels", None)
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    with pytest.raises(ImportError):
        train_gpt.provide_flash_attention_3()
