"""How many mutants of the core its tests kill: a seeded sample, by cosmic-ray. Not part of CI.

    pip install cosmic-ray
    python tests/mutants.py [--count 120] [--seed 0] [--workers 2] [--out mutants.json]

Each worker mutates a clone of its own, one place at a time, and runs the fast profile of the core's tests there (hypothesis with few
examples). Places in type annotations are left out: they are not run.
"""

import argparse
import ast
import json
import os
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CORE = [path.stem for path in sorted((ROOT / "parallel_decode").glob("*.py"))]
CORE = [
    name
    for name in CORE
    if name not in ("__init__", "cli", "_progress", "plan", "calibration", "testing", "_checks", "_subject")
]
QUICK = ["units", "solver", "exactness", "verify", "testing", "auto", "theorems", "pass_hook", "options"]
REST = ["edges", "secant", "gradients", "reentrancy", "plan"]  # these import more
CONFIG = """[cosmic-ray]
module-path = [{modules}]
timeout = 300.0
excluded-modules = []
test-command = "bash -c '{python} {options} {quick} && {python} {options} {rest}'"
[cosmic-ray.distributor]
name = "local"
"""


def annotated_lines(path: Path) -> set[tuple[int, int]]:
    """(line, column) of everything inside an annotation."""
    places: set[tuple[int, int]] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        for name in ("annotation", "returns"):
            inner = getattr(node, name, None)
            if isinstance(inner, ast.expr):
                places |= {(n.lineno, n.col_offset) for n in ast.walk(inner) if isinstance(n, ast.expr)}
                places |= {(inner.lineno, column) for column in range(inner.col_offset, inner.end_col_offset or 0)}
    return places


def prepare(folder: Path, python: str) -> list[dict[str, Any]]:
    """A clone with a session in it; returns its mutants."""
    from cosmic_ray.work_db import WorkDB, use_db  # type: ignore[import-not-found]

    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    modules = ", ".join(f'"parallel_decode/{name}.py"' for name in CORE)
    quick, rest = (" ".join(f"tests/test_{name}.py" for name in names) for names in (QUICK, REST))
    options = '-m pytest -x -q -p no:cacheprovider -m \\"not slow\\"'
    (folder / "mutants.toml").write_text(
        CONFIG.format(modules=modules, python=python, options=options, quick=quick, rest=rest)
    )
    subprocess.run(
        [sys.executable, "-m", "cosmic_ray.cli", "init", "mutants.toml", "mutants.sqlite"], cwd=folder, check=True
    )
    found = []
    skip = {f"parallel_decode/{name}.py": annotated_lines(folder / f"parallel_decode/{name}.py") for name in CORE}
    with use_db(str(folder / "mutants.sqlite"), WorkDB.Mode.open) as db:
        for item in db.work_items:
            (mutation,) = item.mutations
            path, start = str(mutation.module_path), mutation.start_pos
            if tuple(start) not in skip[path]:
                found.append({"path": path, "line": start[0], "column": start[1], "operator": mutation.operator_name, "occurrence": mutation.occurrence, "args": mutation.operator_args})  # fmt: skip
    return sorted(found, key=lambda m: (m["path"], m["line"], m["column"], m["operator"], m["occurrence"]))


def run(folder: Path, mutant: dict[str, Any]) -> dict[str, Any]:
    """Apply a mutant in a clone, run the tests, and take it back."""
    settings = json.dumps([mutant | {"config": str(folder / "mutants.toml")}])
    code = (
        "import json, sys; from pathlib import Path; from cosmic_ray.mutating import mutate_and_test; "
        "from cosmic_ray.work_item import MutationSpec; from cosmic_ray.config import load_config; "
        "m = json.loads(sys.argv[1])[0]; c = load_config(m['config']); "
        "r = mutate_and_test([MutationSpec(module_path=Path(m['path']), operator_name=m['operator'], occurrence=m['occurrence'], "
        "start_pos=(m['line'], m['column']), end_pos=(m['line'], m['column'] + 1), operator_args=m['args'])], c['test-command'], c['timeout']); "
        "print('RESULT ' + json.dumps([str(r.test_outcome), str(r.diff)]))"
    )
    environment = os.environ | {"PARALLEL_DECODE_EXAMPLES": "12", "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, settings], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    outcome, diff = json.loads(lines[-1][7:]) if lines else ["error", done.stderr[-2000:]]
    return mutant | {"outcome": outcome.rsplit(".", 1)[-1].lower(), "diff": diff}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--python", default=sys.executable, help="the interpreter that runs the tests")
    parser.add_argument("--again", type=Path, help="the JSON of an earlier run: only what survived there")
    parser.add_argument("--out", type=Path, default=Path("mutants.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / f"clone{i}" for i in range(options.workers)]
        found, *_ = [prepare(folder, options.python) for folder in folders]
        sample = random.Random(options.seed).sample(found, min(options.count, len(found)))
        if options.again:
            sample = [m for m in json.loads(options.again.read_text())["mutants"] if m["outcome"] != "killed"]

        def work(index: int) -> list[dict[str, Any]]:
            done = []
            for mutant in sample[index :: options.workers]:
                done.append(run(folders[index], mutant))
                print(f"{done[-1]['outcome']:10} {mutant['path']}:{mutant['line']} {mutant['operator']}", flush=True)
            return done

        with ThreadPoolExecutor(options.workers) as pool:
            results = [result for part in pool.map(work, range(options.workers)) for result in part]
    killed = sum(result["outcome"] == "killed" for result in results)
    options.out.write_text(
        json.dumps({"found": len(found), "killed": killed, "of": len(results), "mutants": results}, indent=1) + "\n"
    )
    print(f"{killed} of {len(results)} killed (of {len(found)} places)")
    for result in results:
        if result["outcome"] != "killed":
            print(f"\n{result['outcome']}:\n{result['diff']}")


if __name__ == "__main__":
    main()
