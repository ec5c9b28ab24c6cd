"""What an installation holds beside the Python files."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_data_files_are_installed(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path, "build_py", "--build-lib"]
    subprocess.run([*command, tmp_path / "lib"], cwd=ROOT, check=True, timeout=120)
    installed = {str(path.relative_to(tmp_path / "lib")) for path in (tmp_path / "lib").rglob("*")}
    assert installed >= {
        "anabranch/serve/http/playground.html",
        "anabranch/assets/pystdlib-diffqkv/model.safetensors",
        "anabranch/py.typed",
        "anabranch_kernels/py.typed",
        "anabranch_kernels/_C.pyi",
    }
