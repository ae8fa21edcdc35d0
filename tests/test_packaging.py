"""The package as users meet it: wheel, editable install, plain checkout, and their own export.py beside it."""

import ast
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import lowprec

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"lowprec": ROOT / "lowprec", "lowprec.calibration": ROOT / "calibration", "lowprec.export": ROOT / "export"}
USES_EVERY_ROOM = "import lowprec, lowprec.export.bundle, lowprec.calibration, lowprec.norm; print(lowprec.__version__)"


def python_files():
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            if package == "lowprec" and path.relative_to(folder).parts[0] in ("export", "calibration"):
                continue
            yield package, path


def run(*command, cwd, expect=0):
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout.strip()


def test_the_listed_packages_are_the_folders_on_disk():
    on_disk = set()
    for package, path in python_files():
        on_disk.add(".".join([package, *path.relative_to(FOLDERS[package]).parts[:-1]]))
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == on_disk


def test_every_folder_has_an_init_file():
    assert {path.parent for _, path in python_files()} == {
        path.parent for _, path in python_files() if path.name == "__init__.py"
    }


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("lowprec", ("lowprec.export", "lowprec.calibration", "lowprec.cli")),
        ("lowprec.calibration", ("lowprec.export", "lowprec.cli")),
        ("lowprec.export", ("lowprec.cli",)),
    ],
)
def test_rooms_import_only_what_lies_below_them(room, forbidden):
    above = []
    for package, path in python_files():
        inside = path.relative_to(FOLDERS[package]).parts
        if package != room or inside[0] == "cli" or path.name == "__main__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            above += [f"{path}: {n}" for n in names if any(n == f or n.startswith(f + ".") for f in forbidden)]
    assert above == []


def test_no_two_modules_import_each_other_in_a_circle():
    """At import time; names that only types or single functions need are not counted."""
    names = {}
    for package, path in python_files():
        inside = path.relative_to(FOLDERS[package]).with_suffix("").parts
        names[".".join([package, *(part for part in inside if part != "__init__")])] = path
    edges = {}
    for name, path in names.items():
        body = ast.parse(path.read_text()).body
        edges[name] = set()
        for node in body:
            if isinstance(node, ast.Import):
                edges[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                edges[name] |= {full if full in names else node.module for full in whole}
        edges[name] = (edges[name] & set(names)) - {name}
    while free := [name for name, needed in edges.items() if not needed]:
        for name in free:
            del edges[name]
        for needed in edges.values():
            needed -= set(free)
    assert edges == {}


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "matplotlib", "sklearn", "numpy")
    code = f"import lowprec, sys; print([m for m in {heavy!r} if m in sys.modules])"
    assert run(sys.executable, "-c", code, cwd=ROOT) == "[]"


def test_every_public_name_resolves_has_a_docstring_and_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for name in lowprec.__all__:
        assert getattr(lowprec, name).__doc__, name
        assert re.search(rf"\b{name}\b", readme), f"{name} is not in README.md"
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = lowprec.nonsense


def test_importing_a_mapped_folder_by_its_bare_name_is_refused():
    for name in ("export", "calibration"):
        code = f"import {name}"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert f"import lowprec.{name}, not {name}" in done.stderr


def test_a_plain_checkout_works_without_installing(tmp_path):
    python = bare_environment(tmp_path / "venv")
    assert run(python, "-c", USES_EVERY_ROOM, cwd=ROOT) == lowprec.__version__
    assert run(python, "-m", "lowprec", "--version", cwd=ROOT) == f"lowprec {lowprec.__version__}"


def test_the_wheel_holds_every_file_and_works_beside_a_users_own_export_py(tmp_path):
    # The source is copied so that the build leaves no build/ folder behind, links included as git has them.
    source = tmp_path / "source"
    tracked = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in tracked:
        if (ROOT / name).exists():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_symlink():
                target.symlink_to((ROOT / name).readlink())
            else:
                target.write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    expected = {f"{p.replace('.', '/')}/{f.relative_to(FOLDERS[p])}" for p, f in python_files()}
    expected |= {"lowprec/py.typed", "lowprec/export/report.html.j2"}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert expected <= names
    assert not [n for n in names if n.startswith(("export/", "calibration/", "tests/"))]
    work = tmp_path / "user"
    work.mkdir()
    (work / "export.py").write_text("raise SystemExit('the user s own script was imported')")
    for flags in ((wheel,), ("-e", source)):
        python = bare_environment(tmp_path / f"venv-{len(flags)}")
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", *flags, cwd=work)
        assert run(python, "-c", USES_EVERY_ROOM, cwd=work) == lowprec.__version__
        assert run(python.parent / "lowprec", "--version", cwd=work) == f"lowprec {lowprec.__version__}"


def bare_environment(folder):
    """A virtual environment with this one's packages but no installed lowprec: .pth files are not followed."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    packages = [sysconfig.get_path("purelib")]
    hidden = folder / "packages"
    hidden.mkdir()
    for entry in Path(packages[0]).iterdir():
        if not entry.name.startswith(("lowprec", "__editable__", "pip", "_distutils_hack", "distutils-precedence")):
            (hidden / entry.name).symlink_to(entry)
    (Path(site) / "packages.pth").write_text(f"{hidden}\n")
    return python
