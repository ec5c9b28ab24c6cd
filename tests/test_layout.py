"""The floors, checked by reading imports: who may use whom, what every op consists of, what the repository may name."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINE, KERNELS = ROOT / "engine" / "anabranch", ROOT / "kernels" / "anabranch_kernels"
GPU_BY_TORCH = ("skinny_linear",)  # on a GPU torch's own products are the kernels
CPU_BY_TORCH = ("attention",)  # training on a CPU runs torch's own flash attention over expanded heads
OPS = sorted(path.parent.name for path in KERNELS.glob("*/op.py"))
# Inside the engine each floor imports from those before it; every other folder is a family, and families stand alone.
LOWER = ("common", "data", "models")
SHARED_ON_TOP = ("labels", "adapters", "aggregate")
# bench calls the engine as anybody would; the way into `federated` are its modules
PUBLIC = ("LLM", "SamplingParams", "AggregateMethod", "AggregateOptions", "aggregate_files", "federated")


def modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def name_of(path: Path) -> str:
    """`anabranch.serve.blocks` for engine/anabranch/serve/blocks.py."""
    root = KERNELS.parent if path.is_relative_to(KERNELS) else ENGINE.parent
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever the import stands, and each name taken from it as `module.name`."""
    package = name_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def inside(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def family(module: str) -> str:
    """The part after `anabranch.`, empty for the package itself."""
    return [*module.split("."), ""][1]


def allowed_in_engine(source: str, target: str) -> bool:
    """May the engine's folder `source` import the engine's folder `target`?"""
    if source in ("", "cli", "__init__", "__main__") or target in (source, "", "version"):
        return True
    if source == "bench" and target in PUBLIC:
        return True
    if source == "integrations" and target == "federated":  # its methods run inside other people's stacks, too
        return True
    if source in LOWER:
        return target in LOWER[: LOWER.index(source)]
    return target in LOWER or (target in SHARED_ON_TOP and source not in SHARED_ON_TOP)


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def texts() -> Iterator[tuple[Path, str]]:
    for path in tracked():
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").glob("*")), ids=lambda path: path.name)
def test_the_core_knows_neither_python_nor_torch(path):
    included = re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', path.read_text())
    assert [name for name in included if re.match(r"Python\.h|pybind11|torch|ATen|c10|numpy", name)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "bindings").rglob("*.[ch]*")), ids=lambda path: path.name)
def test_bindings_know_pybind_and_the_core_only(path):
    included = re.findall(r'#\s*include\s*"([^"]+)"', path.read_text())
    own = {file.name for folder in ("csrc", "bindings") for file in (ROOT / folder).rglob("*.h")}
    assert set(included) <= own
    assert not re.search(r"#\s*include\s*<(torch|ATen|c10)", path.read_text())


@pytest.mark.parametrize("path", modules(KERNELS), ids=name_of)
def test_kernels_never_import_the_engine(path):
    assert [module for module in imports(path) if inside(module, "anabranch", "transformers")] == []


@pytest.mark.parametrize("path", modules(KERNELS), ids=name_of)
def test_triton_is_met_in_gpu_files_and_the_extensions_beside_the_ops(path):
    found = list(imports(path))
    if not path.stem.startswith("gpu"):
        assert [module for module in found if inside(module, "triton")] == []
    if path.name not in ("cpu.py", "gpu.py", "native.py", "roofline.py"):
        extension = ("anabranch_kernels._C", "anabranch_kernels._cuda", "anabranch_kernels.native")
        assert [module for module in found if inside(module, *extension)] == []


@pytest.mark.parametrize("path", modules(ENGINE), ids=name_of)
def test_the_engine_calls_ops_only(path):
    forbidden = ("triton", "anabranch_kernels._C", "anabranch_kernels._cuda", "anabranch_kernels.native")
    assert [module for module in imports(path) if inside(module, *forbidden)] == []


@pytest.mark.parametrize("path", modules(ENGINE), ids=name_of)
def test_engine_modules_import_from_lower_floors(path):
    source = family(name_of(path))
    targets = {family(module) for module in imports(path) if inside(module, "anabranch")}
    assert {target for target in targets if not allowed_in_engine(source, target)} == set()


def test_the_rule_of_floors_tells_up_from_down():
    assert allowed_in_engine("serve", "models")
    assert allowed_in_engine("cli", "serve")
    assert allowed_in_engine("federated", "labels")
    assert allowed_in_engine("federated", "aggregate")
    assert allowed_in_engine("integrations", "aggregate")
    assert allowed_in_engine("integrations", "federated")
    assert not allowed_in_engine("federated", "integrations")
    assert not allowed_in_engine("integrations", "serve")
    assert allowed_in_engine("bench", "LLM")
    assert not allowed_in_engine("train", "LLM")
    assert not allowed_in_engine("models", "serve")
    assert not allowed_in_engine("common", "models")
    assert not allowed_in_engine("serve", "train")
    assert not allowed_in_engine("labels", "adapters")
    assert not allowed_in_engine("aggregate", "federated")
    assert not allowed_in_engine("models", "aggregate")


def test_source_roots_are_not_packages():
    """An `__init__.py` in kernels/ would hide Hugging Face's package of that name."""
    assert [path for path in ("engine/__init__.py", "kernels/__init__.py") if (ROOT / path).exists()] == []
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_the_kernels_package_re_exports_nothing():
    """A function named like its folder would hide the folder."""
    tree = ast.parse((KERNELS / "__init__.py").read_text())
    assert [node for node in tree.body if not isinstance(node, ast.Expr)] == []


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_five_things(op):
    wanted = [KERNELS / op / name for name in ("op.py", "reference.py", "cpu.py")]
    wanted += [] if op in GPU_BY_TORCH else [KERNELS / op / "gpu.py"]
    wanted += [] if op in CPU_BY_TORCH else [ROOT / "csrc" / f"{op}.cpp"]
    wanted += [ROOT / "tests" / "kernels" / f"test_{op}.py"]
    wanted += [ROOT / "benchmarks" / f"bench_{op}.py"]
    assert [str(path.relative_to(ROOT)) for path in wanted if not path.is_file()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "engine").rglob("test_*.py")), ids=lambda path: path.stem)
def test_tests_stand_at_the_mirrored_path(path):
    folder = ENGINE / path.parent.relative_to(ROOT / "tests" / "engine")
    tested = folder / path.stem.removeprefix("test_")
    assert any(tested.with_suffix(suffix).is_file() for suffix in (".py", ".html"))


@pytest.mark.parametrize("path", modules(ENGINE) + modules(KERNELS), ids=name_of)
def test_every_module_says_what_it_is_and_is_named_for_it(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path.name} has no docstring"
    assert not re.search(r"util|helper|manager|misc", path.stem)


@pytest.mark.parametrize("path", modules(ENGINE) + modules(KERNELS), ids=name_of)
def test_nothing_is_unpickled(path):
    assert [module for module in imports(path) if inside(module, "pickle", "dill", "cloudpickle", "joblib")] == []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("weights_only") == "True"


def test_the_package_imports_without_torch():
    code = "import sys, anabranch.cli; print({'torch', 'numpy', 'transformers', 'triton'} & set(sys.modules) or '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_nothing_tracked_names_a_machine_or_a_registry():
    places = ["/" + "work/", "/" + "root/", "/" + "home/", "/" + "opt/"]
    hosts = ["py" + "pi.org", "python" + "hosted.org", "download.py" + "torch.org", "npm" + "js.org", "crates" + ".io"]
    hosts += ["deb." + "debian.org"]
    found = [(path.name, name) for path, text in texts() for name in places + hosts if name in text]
    assert found == []


def test_nothing_tracked_is_left_for_later():
    words = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX|Not" + r"ImplementedError)\b")
    found = [(path.name, match[0]) for path, text in texts() if (match := words.search(text))]
    assert found == []


def test_nothing_tracked_is_large():
    """The package's model may take 4 MB; everything else is text."""
    large = [
        path.name for path in tracked() if path.stat().st_size > (4 << 20 if path.suffix == ".safetensors" else 1 << 20)
    ]
    assert large == []
