"""Which device is chosen: what is asked for, what the environment names, what there is."""

import pytest
import torch

import tunekit as tk
from tunekit.core.model import devices


def test_the_environment_names_the_device_that_a_pipeline_leaves_open(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TUNEKIT_DEVICE")
    assert (devices.choose(None), devices.choose("cpu"), devices.choose(None, before="cpu")) == ("cuda", "cpu", "cpu")
    monkeypatch.setenv("TUNEKIT_DEVICE", "cpu")
    assert (devices.choose(None), devices.choose("cuda:1")) == ("cpu", "cuda:1")
    monkeypatch.setenv("TUNEKIT_DEVICE", "gpu")
    with pytest.raises(tk.ConfigError, match="TUNEKIT_DEVICE: must be 'cpu', 'cuda' or 'cuda:1', got 'gpu'"):
        devices.choose(None)
