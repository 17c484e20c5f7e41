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


def test_imports_point_one_way_from_config_through_the_helpers_to_the_scripts():
    scripts = {"train", "evaluate", "inference"}
    for module in MODULES:
        imported = set()
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
        assert not imported & scripts, module.name
        if module.stem == "config":
            assert not imported
        if module.stem != "settings_utils":
            assert "config" not in imported, f"{module.name}: settings are passed, not imported"


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
    own = {"dry_run", "fresh", "debug", "demo", "base_only", "adapter_path", "help", "logdir", "num_processes", "dist"}
    flags = set(re.findall(r"--([a-z0-9_]+)", README)) - own
    assert flags
    assert flags <= set(DEFAULTS)
    settings = set(re.findall(r"`([A-Z][A-Z0-9_]{3,})`", README)) - {"HF_TOKEN", "CPU_DEMO"}
    assert settings <= {name.upper() for name in DEFAULTS}


def test_every_file_that_the_readmes_tree_names_exists():
    tree = README.split("## The tree", 1)[1].split("```")[1]
    names = re.findall(r"^(\S+)", tree, flags=re.M)
    assert len(names) > 15
    for name in names:
        assert (PROJECT / name).exists(), name


def test_the_readmes_tree_names_every_script():
    text = (PROJECT / "README.md").read_text()
    assert not [path.name for path in PROJECT.glob("*.py") if f"\n{path.name} " not in text]


def test_requirements_are_pinned_exactly():
    for name in ("requirements.txt", "tests/requirements.txt"):
        for line in (PROJECT / name).read_text().splitlines():
            if line and not line.startswith(("#", "-r")):
                assert re.fullmatch(r"[a-z-]+==[0-9.]+(; python_version .*)?", line), line
