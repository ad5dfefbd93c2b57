"""The wallet as a package: what is in it, and that a program can embed, type-check and test it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

import wallet as wallet_module
from tests.support import HERE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DATA = {"schema.sql", "checks.sql", "openapi.yaml", "wallet.html"}
PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built as pip does it, but from what is installed here already."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        str(HERE),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel's content, as on a path of Python's."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(*arguments, cwd, path=(), **variables):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **variables}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=120,
    )


def test_wheel_has_every_file_that_the_code_reads_and_nothing_beside_its_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package = {name.partition("/")[2] for name in names if name.startswith("wallet/")}
    assert package == {"__init__.py", "__main__.py", "py.typed", "pytest_plugin.py", *DATA}
    roots = {name.partition("/")[0] for name in names}
    assert roots == {"wallet", f"wallet-{wallet_module.__version__}.dist-info"}
    read = set(
        re.findall(r'_(?:read_file|read_sql)\("([\w.]+)"\)', Path(HERE / "wallet.py").read_text())
    )
    assert read == DATA


def test_version_has_one_source():
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT


def test_installed_wallet_runs_from_any_folder(installed, tmp_path):
    told = run("-m", "wallet", "--version", cwd=tmp_path, path=[installed])
    assert (told.returncode, told.stdout) == (0, f"wallet {wallet_module.__version__}\n")
    verified = run(
        "-m", "wallet", "verify", "--dsn", "sqlite:///no.db", cwd=tmp_path, path=[installed]
    )
    assert (verified.returncode, "there is no such file" in verified.stderr) == (2, True)
    points = (
        installed / f"wallet-{wallet_module.__version__}.dist-info" / "entry_points.txt"
    ).read_text()
    assert "wallet = wallet:main" in points
    assert "wallet = wallet.pytest_plugin" in points


def test_program_that_embeds_the_wallet_runs_and_has_no_type_errors(installed, tmp_path):
    shop = HERE / "tests" / "embedding" / "shop.py"
    done = run(str(shop), cwd=tmp_path, path=[installed])
    assert (done.returncode, done.stderr) == (0, "")
    checked = run(
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        "--cache-dir",
        str(tmp_path / "cache"),
        "--no-site-packages",
        str(shop),
        cwd=tmp_path,
        path=[installed],
        MYPYPATH=str(installed),
    )
    reported = [line for line in checked.stdout.splitlines() if line.startswith(str(shop))]
    assert reported == []
    assert "mypy" not in checked.stderr


def test_fixtures_for_tests_of_programs_need_no_more_than_the_package(installed, tmp_path):
    page = (HERE / "docs" / "embedding.md").read_text()
    (tmp_path / "test_shop.py").write_text(re.findall(r"(?s)```python\n(import.*?)```", page)[-1])
    done = run(
        "-m",
        "pytest",
        "-q",
        "-W",
        "error",
        "-p",
        "no:cacheprovider",
        "-p",
        "wallet.pytest_plugin",
        cwd=tmp_path,
        path=[installed],
        PYTEST_ADDOPTS="",
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
    )
    assert (done.returncode, "2 passed" in done.stdout) == (0, True), done.stdout + done.stderr


def test_wallet_that_is_vendored_as_two_files_can_be_tested_and_says_what_is_missing(tmp_path):
    for name in ("wallet.py", "schema.sql"):
        (tmp_path / name).write_bytes((HERE / name).read_bytes())
    (tmp_path / "test_shop.py").write_text(
        "from wallet import Wallet\n\n\ndef test_it():\n    with Wallet() as wallet:\n"
        "        assert wallet.register('Ada')[0].balance == 0\n"
    )
    done = run(
        "-m",
        "pytest",
        "-q",
        "-W",
        "error",
        "-p",
        "no:cacheprovider",
        cwd=tmp_path,
        PYTEST_ADDOPTS="",
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
    )
    assert (done.returncode, "1 passed" in done.stdout) == (0, True), done.stdout + done.stderr
    said = run("-c", "from wallet import Wallet; Wallet()", cwd=tmp_path)
    assert "checks.sql is not installed beside wallet.py" in said.stderr


def test_core_needs_little_and_each_pin_is_within_what_the_project_says():
    assert {re.split("[>=]", one)[0] for one in PROJECT["dependencies"]} == {"bottle", "waitress"}
    assert PROJECT["optional-dependencies"].keys() == {"metrics", "postgres"}
    pins = dict(line.split("==") for line in (HERE / "requirements.txt").read_text().split())
    extras = [one for many in PROJECT["optional-dependencies"].values() for one in many]
    for needed in PROJECT["dependencies"] + extras:
        name, _, least = needed.partition(">=")
        assert tuple(map(int, pins[name].split("."))) >= tuple(map(int, least.split(".")))
        assert distribution(name.partition("[")[0]).version == pins[name]


def test_new_movement_type_is_missed_wherever_it_is_to_be_added():
    types = set(wallet_module.SIGN_BY_TYPE)
    assert types == set(wallet_module.TransactionType.__args__)
    assert [row for row in wallet_module.SIGN_BY_TYPE.values() if row not in (1, -1)] == []
    for name in ("schema.sql", "checks.sql", "openapi.yaml", "wallet.html", "tests/support.py"):
        text = (HERE / name).read_text()
        assert {one for one in types if not re.search(rf"\b{one}\b", text)} == set(), name
        assert f"`{name}`" in (HERE / "CONTRIBUTING.md").read_text()
