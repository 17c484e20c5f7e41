"""The code is clean, the README's commands are real, and the layout is the promised one."""

import ast
import re
import subprocess
import sys

import pytest

from conftest import PROJECT
from settings_utils import DEFAULTS

README = (PROJECT / "README.md").read_text(encoding="utf-8")
MODULES = sorted(PROJECT.glob("*.py"))


@pytest.mark.parametrize("check", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff_finds_nothing(check):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *check, "."], capture_output=True, text=True, cwd=PROJECT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def imports_of(module):
    """[(name of the imported module, the import's node, whether it stands in a function)], LateImport's included."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    inner = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node, node in inner) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, node, node in inner
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "LateImport":
            yield node.args[0].value, node, node in inner


def test_imports_point_one_way_from_config_through_the_helpers_to_the_scripts():
    ours = {module.stem: module for module in MODULES}
    graph = {name: {found for found, _, _ in imports_of(module)} & ours.keys() for name, module in ours.items()}
    for name, imported in graph.items():
        assert not imported & {"train", "evaluate", "inference"}, name
        if name != "settings_utils":
            assert "config" not in imported, f"{name}: settings are passed, not imported"
    assert not graph["config"]
    while leaves := [name for name, imported in graph.items() if not imported & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"these import each other: {', '.join(graph)}"


def test_imports_stand_on_top_but_for_a_few_doors_that_give_their_reason():
    doors = [(module, node) for module in MODULES for _, node, inner in imports_of(module) if inner]
    assert len(doors) <= 6, [f"{module.name}:{node.lineno}" for module, node in doors]
    for module, node in doors:
        lines = module.read_text(encoding="utf-8").splitlines()[node.lineno - 2 : node.lineno]
        assert any("#" in line for line in lines), f"{module.name}:{node.lineno} gives no reason"


# what the engine sets on objects of other libraries
PATCHED = {"forward", "zero_grad", "prepare_model", "found_inf", "_attn_implementation"}


def test_only_the_engine_imports_triton_or_patches_a_model():
    for module in MODULES:
        if module.stem.startswith("engine_"):
            continue
        assert "triton" not in {name.split(".")[0] for name, _, _ in imports_of(module)}, module.name
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else []
            assigned = {target.attr for target in targets if isinstance(target, ast.Attribute)}
            assert not assigned & PATCHED, f"{module.name}:{node.lineno}"
            called = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            assert called != "Patches", f"{module.name}:{node.lineno}"


def test_no_file_shadows_a_library_and_no_data_folder_is_a_package():
    assert not (PROJECT / "datasets.py").exists()
    for folder in ("data", "models", "output", "logs"):
        assert not (PROJECT / folder / "__init__.py").exists()


def test_nothing_asks_for_remote_code_or_unsafe_pickles():
    for module in MODULES:
        text = module.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text, module.name
        assert "weights_only=False" not in text, module.name


def test_the_readmes_set_up_commands_make_their_environment_and_name_real_files():
    commands = re.findall(r"^python3 -m venv .*$", README, flags=re.M)
    assert len(commands) == 2
    assert commands[0].endswith("python train.py")
    assert commands[1].endswith("python -m pytest -q -n 2 --dist loadfile")
    for command in commands:
        for name in re.findall(r"-r (\S+)", command):
            assert (PROJECT / name).is_file()


def test_every_flag_and_setting_that_the_readme_names_exists():
    own = {
        "dry_run",
        "fresh",
        "debug",
        "events",
        "config",
        "demo",
        "base_only",
        "input_file",
        "output_file",
        "compare",
        "adapter_path",
        "help",
        "logdir",
        "num_processes",
        "config_file",
        "main_process_ip",
        "machine_rank",
        "include_trained_rows",
        "benchmarks",
        "benchmark_limit",
        "dist",
        "into",
        # vLLM's, and of the converter to GGUF
        "served-model-name",
        "enable-lora",
        "max-lora-rank",
        "lora-modules",
        "chat-template",
        "outfile",
        "outtype",
    }
    flags = set(re.findall(r"--([a-z][a-z0-9_-]*)", README)) - own
    assert flags
    assert flags <= set(DEFAULTS)
    settings = set(re.findall(r"`([A-Z][A-Z0-9_]{3,})`", README)) - {"HF_TOKEN", "CPU_DEMO"}
    assert settings <= {name.upper() for name in DEFAULTS}


TREE = README.split("## The tree", 1)[1]


def test_every_file_that_the_readmes_tree_names_exists():
    names = re.findall(r"^(\S+)", TREE.split("```")[1], flags=re.M)
    assert len(names) > 15
    for name in names:
        assert (PROJECT / name).exists(), name


def test_the_readmes_tree_names_every_script():
    assert not [path.name for path in MODULES if f"\n{path.name} " not in TREE]


def test_the_readme_says_how_many_lines_there_are_to_read():
    found = re.search(r"The six have about ([\d,]+) lines together, all files about ([\d,]+)", TREE)
    six, every = (int(number.replace(",", "")) for number in found.groups())
    named = re.findall(r"^(\S+\.py)", TREE.split("```")[1].split("\n\n")[0], flags=re.M)
    assert len(named) == 6
    lines = {path.name: path.read_text(encoding="utf-8").count("\n") for path in MODULES}
    assert six == pytest.approx(sum(lines[name] for name in named), rel=0.05)
    assert every == pytest.approx(sum(lines.values()), rel=0.05)


def test_requirements_are_pinned_exactly():
    for name in ("requirements.txt", "tests/requirements.txt"):
        for line in (PROJECT / name).read_text().splitlines():
            if line and not line.startswith(("#", "-r")):
                assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+(; python_version .*)?", line), line
