"""What importing costs, and that the examples run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_importing_the_solver_imports_torch_and_nothing_heavier() -> None:
    heavy = "{'diffusers', 'huggingface_hub', 'matplotlib', 'rich', 'safetensors', 'sklearn', 'tqdm', 'transformers', 'typer'}"
    before = "import sys, torch; before = set(sys.modules); import parallel_decode, parallel_decode.testing"
    check = f"new = {{m.split('.')[0] for m in set(sys.modules) - before}} & {heavy}; assert not new, new"
    subprocess.run([sys.executable, "-c", f"{before}; {check}"], check=True)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(example)], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "passes" in done.stdout


@pytest.mark.parametrize(
    ("page", "blocks"), [("README.md", 4), ("docs/index.md", 1), ("docs/tarflow.md", 2)], ids=lambda value: str(value)
)
def test_the_examples_of_a_page_run(
    page: str, blocks: int, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the plan is written there
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(found) == blocks
    names: dict[str, object] = {}
    for block in found:
        exec(block, names)  # noqa: S102
    assert "within tolerance" in capsys.readouterr().out


def test_the_readme_is_short_and_names_files_that_there_are() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 120
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(((?!http)[^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


@pytest.mark.slow
def test_the_benchmark_of_language_models_runs(tmp_path: Path) -> None:
    for words in (
        ("language_model.py", "--out", "model", "--minutes", "0.02", "--width", "64", "--layers", "1"),
        (
            "language.py",
            "--model",
            "model",
            "--prompts",
            "2",
            "--tokens",
            "8",
            "--rounds",
            "1",
            "--batches",
            "1,2",
            "--threads",
            "1",
            "--out",
            "a.json",
        ),
    ):
        command = [sys.executable, str(ROOT / "benchmarks" / words[0]), *words[1:]]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "prose, batch 2, T = 1.0" in done.stdout
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert len(rows) == 12 and all(row["methods"]["auto"]["same"] == 1 for row in rows)


@pytest.mark.parametrize(
    ("words", "written", "expected"),
    [
        (("overhead.py", "--runs", "1", "--length", "16", "--out", "a/b.json"), "a/b.json", "Sliding(width=64)"),
        (("flows.py", "--runs", "1", "--batches", "1", "--methods", "SeJD", "--out", "a"), "a/bench.json", "SeJD (tau"),
        (
            ("maf.py", "--rows", "ar(1)", "--dims", "8", "--batches", "4", "--train", "0.002", "--out", "a.json"),
            "a.json",
            "normflows MAF",
        ),
        (("choices.py", "--passes", "3", "--out", "a.json"), "a.json", "speculative"),
    ],
)
def test_benchmarks_run(words: tuple[str, ...], written: str, expected: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert expected in done.stdout
    assert {"machine", "versions"} < json.loads((tmp_path / written).read_text()).keys()


def test_every_package_is_listed_for_the_wheel() -> None:
    """One that is not works from a checkout, and is silently missing from the wheel."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^packages = \[(.*?)\]$", text, re.MULTILINE)
    mapped = re.search(r"^package-dir = \{(.*?)\}$", text, re.MULTILINE)
    assert listed and mapped
    names = set(re.findall(r'"([\w.]+)"', listed[1]))
    folders = {path.parent for path in (ROOT / "adapters").rglob("__init__.py")}
    adapters = {f"parallel_decode.{'.'.join(folder.relative_to(ROOT).parts)}": folder for folder in folders}
    own = {f"parallel_decode.{path.parent.name}" for path in (ROOT / "parallel_decode").glob("*/__init__.py")}
    assert names == {"parallel_decode", *(own - {"parallel_decode.adapters"}), *adapters}
    places = dict(re.findall(r'"([\w.]+)" = "([\w/]+)"', mapped[1]))
    assert places == {name: str(folder.relative_to(ROOT)) for name, folder in adapters.items()}


def test_the_modules_of_the_core_form_no_circle_and_no_file_is_long() -> None:
    """Imports inside functions and for types count, too."""
    files = {}
    for path in (ROOT / "parallel_decode").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1:] != ("__init__",) and parts[1] != "adapters":
            files[".".join(parts).removesuffix(".__init__")] = path.read_text()
    assert {"parallel_decode._iterate", "parallel_decode.cached", "parallel_decode.cached.reads"} <= files.keys()
    imports = {
        name: {
            found
            for found in re.findall(r"^\s*(?:from|import) (parallel_decode[.\w]+)", text, re.MULTILINE)
            if found in files
        }
        - {name}
        for name, text in files.items()
    }
    while free := {name for name, needed in imports.items() if not needed}:
        imports = {name: needed - free for name, needed in imports.items() if name not in free}
    assert not imports, f"these import one another: {sorted(imports)}"
    assert {name: lines for name, text in files.items() if (lines := text.count("\n")) > 200} == {}
