"""The rules of the house: what may import what, ceilings, columns, packages, loops of functions."""
import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = sorted(ROOT.glob("0[0-9]_*.py"))
PRODUCT = [ROOT / "common.py", *STAGES, *sorted((ROOT / "lab").glob("*.py"))]
EVERY = PRODUCT + [p for d in ("tests", "bench", "lessons") for p in
                   sorted((ROOT / d).rglob("*.py")) if ".env-" not in str(p)]
CEILINGS = {"00_data.py": 220, "08_evaluate.py": 200, "09_report.py": 60, "common.py": 450,
            "lab/driver.py": 200, "lab/record.py": 350, "lab/verify.py": 160, "run_all.sh": 60,
            "README.md": 180}
# 03 labels and 08 compares by a judge, 06 measures by gold
OF_LAB = {"00": {"base_model", "formats", "sources", "toy_world"},
          "03": {"judges"}, "06": {"judges"}, "08": {"judges"}, "09": {"page"}}
# import name: name in requirements.txt, where they differ
OPTIONAL = {"zstandard"}  # asked for where it is needed
PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow"}


def imports(path):
    """Full names of the modules that a file imports, at any place in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{a.name}" for a in node.names} | {node.module}
    return found


def ours(path):
    """Of those, the project's own: `common`, `lab.X`, stages."""
    names = {f"lab.{p.stem}" for p in (ROOT / "lab").glob("*.py")} | {"common"} | {
        p.stem for p in STAGES}
    return imports(path) & names


@pytest.mark.parametrize("path", STAGES, ids=lambda p: p.stem)
def test_a_stage_imports_common_and_what_it_may_of_lab(path):
    allowed = {"common"} | {f"lab.{name}" for name in OF_LAB.get(path.name[:2], ())}
    assert ours(path) <= allowed
    assert "import_module" not in path.read_text() and "__import__" not in path.read_text()


def test_only_experiments_and_tests_load_stages():
    assert ours(ROOT / "common.py") == {"lab.record"}
    loading = {p.name for p in PRODUCT if "import_module" in p.read_text()}
    assert loading == {"experiments.py"}


def test_no_circle():
    graph = {("common" if p.name == "common.py" else f"lab.{p.stem}"): ours(p) for p in PRODUCT
             if p not in STAGES}

    def reach(name, seen):
        assert name not in seen, [*seen, name]
        for other in graph.get(name, ()):
            reach(other, [*seen, name])
    for name in graph:
        reach(name, [])


def test_third_party_imports_are_listed():
    listed = set(re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.M))
    local = {"lab", "common", "conftest", *(p.stem for p in EVERY)}
    for path in EVERY:
        top = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - local
        assert {PACKAGES.get(name, name) for name in top} - OPTIONAL <= listed, path


@pytest.mark.parametrize("name, most", CEILINGS.items())
def test_ceilings(name, most):
    assert (ROOT / name).read_text(encoding="utf-8").count("\n") <= most


def test_columns_and_lengths():
    for path in STAGES:
        assert path.read_text(encoding="utf-8").count("\n") <= 300, path
    for path in [*EVERY, ROOT / "run_all.sh"]:
        wide = [i for i, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
                if len(line) > 100]
        assert not wide, (path, wide)
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, (path, node.name)


def test_algorithm_1_stands_alone():
    """Its lines 1 to 8 follow one another in the loop of 07, nothing between them."""
    lines = (ROOT / "07_metarm.py").read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if "# 1, 2, 3" in line)
    assert [re.search(r"# +(\d)?", line)[1] for line in lines[first:first + 7]] == [
        "1", "4", "5", "6", "7", None, "8"]
