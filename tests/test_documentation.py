"""The documentation names what exists: files, commands, variables of its code, and the API reference."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.yaml")]
needs_pdoc = pytest.mark.skipif(not importlib.util.find_spec("pdoc"), reason="runs once pdoc is installed")


def test_the_hooks_run_on_files_that_exist():
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    named = set(re.findall(r"\btests/\S+?\.py\b", text))
    assert len(named) == 1 and all((ROOT / path).is_file() for path in named)
    assert any("pytest" in hook["entry"] for repo in yaml.safe_load(text)["repos"] for hook in repo["hooks"])


def test_the_code_of_the_readme_defines_its_names():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    words = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E9,F821,F811", "-"]
    done = subprocess.run(words, input="\n".join(blocks), capture_output=True, text=True, timeout=60)
    assert len(blocks) > 3 and done.returncode == 0, done.stdout


def test_commands_of_several_workers_wait_for_them():
    commands = [line for path in TEXTS for line in path.read_text(encoding="utf-8").splitlines() if "msrun --" in line]
    assert len(commands) > 5 and all("--join=True --log_dir=log" in line for line in commands)


@pytest.mark.slow
@needs_pdoc
def test_the_api_reference_shows_the_call_of_a_pipeline(tmp_path):
    build = [sys.executable, ROOT / "docs" / "build_api.py", "--output", tmp_path]
    subprocess.run([*build, "pixart_nb.core.sampling.pipeline"], check=True, timeout=300)
    page = (tmp_path / "pixart_nb" / "core" / "sampling" / "pipeline.html").read_text(encoding="utf-8")
    assert 'id="PixArtSigmaPipeline.__call__"' in page and "Draw images of the prompts" in page
    assert 'id="PixArtSigmaPipeline.sampling_defaults"' not in page


@needs_pdoc
def test_the_api_reference_has_every_package_and_no_program(project):
    code = (
        "import sys; sys.path.insert(0, 'docs'); import build_api, pixart_nb.core.lora as lora; "
        "build_api.resolve(lora); "
        "print(*build_api.module_names()); print('LoraConfig' in vars(lora))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, timeout=300)
    names, resolved = done.stdout.splitlines()
    assert {"pixart_nb", "pixart_nb.core.hooks", "pixart_nb.viz", "pixart_nb.pixelart"} <= set(names.split())
    assert "cli" not in names and "__main__" not in names and resolved == "True"
