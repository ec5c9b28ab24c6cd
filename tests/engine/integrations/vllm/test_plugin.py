"""The plug-in registers one path, costs nothing without vLLM, and says what is missing."""

import subprocess
import sys
import tomllib
from importlib import import_module

import pytest

from anabranch.integrations.vllm import plugin


def test_vllm_finds_it_by_its_entry_point(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["vllm.general_plugins"]["anabranch"].split(":")
    assert getattr(import_module(module), name) is plugin.register


def test_the_path_it_registers_leads_to_the_back_end(vllm):
    plugin.register()
    plugin.register()  # vLLM may load it more than once
    ((member, path),) = vllm.items()
    assert member.name == "CUSTOM"
    module, name = path.rsplit(".", 1)
    backend = getattr(import_module(module), name)
    assert backend.get_name() == "CUSTOM"


def test_importing_it_imports_neither_vllm_nor_torch():
    code = "import sys, anabranch.integrations.vllm.plugin; print({'vllm', 'torch'} & set(sys.modules) or '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_without_vllm_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"needs a vLLM with vllm\.v1\.attention\.backends\.registry"):
        plugin.register()


def test_with_another_vllm_the_back_end_says_what_is_missing(vllm, monkeypatch):
    monkeypatch.delattr(sys.modules["vllm.v1.attention.backend"], "AttentionImpl")
    with pytest.raises(ImportError, match=r"for vLLM 0\.33\.0, .*AttentionImpl"):
        import_module(plugin.BACKEND.rsplit(".", 1)[0])
