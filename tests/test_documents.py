"""The documents and the contract, held to the code."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request

import pytest
from packaging.requirements import Requirement
from uv import find_uv_bin

import wallet as wallet_module
import wallet_cli
import wallet_commands
import wallet_server
from tests.support import (
    CONTRACT,
    HERE,
    ISSUER_TOKEN,
    OPEN_ROUTES,
    OPERATIONS,
    PAGES,
    README,
    ROUTES,
    environment,
    load_yaml,
    operations_of,
    raw_requests,
    readme_table,
    served,
    strict_contract,
    torture,
)
from wallet import ConfigurationError, Wallet, WalletError, running

# The documents, held to the code ##################################################################


def test_readme_lists_every_setting():
    assert readme_table("Settings") == [
        [
            f"`--{setting.name}`",
            f"`{setting.variable}`",
            setting.default and f"`{setting.default}`",
            setting.meaning,
        ]
        for setting in wallet_cli.SETTINGS
    ]


def test_readme_lists_every_command():
    assert readme_table("Commands") == [
        [f"`{one.name}`", one.meaning, f"`python wallet.py {one.example}`"]
        for one in wallet_commands.COMMANDS
    ]


def error_classes(base=WalletError):
    for one in base.__subclasses__():
        if one.__module__ == "wallet" and one is not ConfigurationError:
            yield one
            yield from error_classes(one)


def test_readme_and_contract_list_every_error():
    known = sorted((one.status, one.code) for one in error_classes())
    named = sorted((one.status, one.code, one.__name__) for one in error_classes())
    assert (
        sorted(
            (int(row[0]), row[1].strip("`"), row[2].strip("`")) for row in readme_table("Errors")
        )
        == named
    )
    declared = CONTRACT["components"]["schemas"]["Problem"]["properties"]["code"]["x-extensible-enum"]
    assert sorted(declared) == sorted(code for _, code in known)


def test_readme_and_contract_list_every_route():
    known = {
        re.sub("<.*?>", "{id}", name.replace(wallet_module.ACCOUNT_PATH, "/api/accounts/{account_id}"))
        for name in ROUTES
    }
    listed = {re.match("`([^`?]+)", row[0])[1] for row in readme_table("Routes")}
    # What the issuer does for an account is what the account does for itself, but for two.
    below = {name for name in known if "{account_id}/" in name}
    itself = {re.sub("accounts/{account_id}/(?=balance|token)", "account/", name) for name in below}
    itself = {name.replace("accounts/{account_id}/", "") for name in itself}
    assert itself - known == {"POST /api/freeze", "POST /api/unfreeze"}
    assert listed == {name.replace("account_id", "id") for name in known - below}
    assert set(OPERATIONS) == known


def documents_in(node):
    if isinstance(node, dict):
        yield node
    for child in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        yield from documents_in(child)


def test_examples_in_the_documents_are_real():
    classes = {one.code: one for one in error_classes()}
    problems = [
        one
        for one in documents_in(CONTRACT)
        if isinstance(one.get("title"), str) and "detail" in one
    ]
    assert len(problems) >= 10
    for problem in problems:
        known = classes[problem["code"]]
        assert (problem["status"], problem["title"]) == (known.status, known.title)
        assert problem["detail"] == known.advice or not known.advice or "(" in problem["detail"]
    tokens = re.findall("wlt_[0-9A-Za-z]{20,}", README + (HERE / "openapi.yaml").read_text())
    assert len(set(tokens)) == 2
    assert all(wallet_module._checksum(token[:-6]) == token[-6:] for token in tokens)


def test_contract_opens_the_routes_that_are_open():
    declared = {
        name
        for name, operation in OPERATIONS.items()
        if operation.get("security") in ([], [{}, {"token": []}])
    }
    assert declared == OPEN_ROUTES


def test_readme_names_a_test_for_every_promise():
    named = [re.findall(r"`(test_\w+)`", row[2]) for row in readme_table("What it promises")]
    assert len(named) == 5
    known = all_tests().keys()
    assert all(names and {*names} <= known for names in named)
    promises = re.sub(r"\s+", " ", wallet_module.__doc__)
    for number, row in enumerate(readme_table("What it promises"), 1):
        assert f"{number}. {row[0]}" in promises


def all_tests():
    """Return every test of the project, parsed, by its name."""
    files = HERE / "test_wallet.py", *(HERE / "tests").glob("test_*.py")
    return {
        node.name: node
        for file in files
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_code_is_small_enough_to_be_read():
    source = (HERE / "wallet.py").read_bytes()
    assert (source.count(b"\n") <= 2_700, len(source) <= 125_000) == (True, True)
    parts = wallet_server._Parser, wallet_server._Task, wallet_server._Channel, wallet_server.Server
    lines = "".join(map(inspect.getsource, parts)).splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 130  # Within waitress's own classes.


def test_readme_has_at_most_200_lines_and_its_links_lead_somewhere():
    assert PAGES["README.md"].count("\n") <= 200
    for name, text in PAGES.items():
        folder = HERE if name == "README.md" else HERE / "docs"
        links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
        assert [link for link in links if not (folder / link).exists()] == [], name


def test_no_page_says_what_another_says():
    sentences = {
        name: set(re.findall(r"[A-Z][^.|`]{60,}\.", re.sub(r"\s+", " ", text)))
        for name, text in PAGES.items()
    }
    for one, other in itertools.combinations(sentences, 2):
        assert not sentences[one] & sentences[other], (one, other)


def test_readme_names_the_run_behind_each_piece_of_evidence():
    tests = all_tests()
    rows = readme_table("The evidence")
    assert len(rows) >= 12
    complete = []  # Whose short form is all there is.
    for promise, _, found, name in rows:
        assert re.search(r"\d", found), promise
        decorators = " ".join(ast.unparse(one) for one in tests[name.strip("`")].decorator_list)
        complete += [name] if "torture" not in decorators.lower() else []
    assert len(complete) == 4
    assert f"{len(list(raw_requests()))} requests with a second one" in README


def test_readme_tells_the_versions_whose_advisories_were_read():
    told = (
        " ".join(row[0] for row in readme_table("What else keeps it safe")).replace(",", "").split()
    )
    pinned = (
        re.sub(r"\[.*?\]", "", (HERE / "requirements.txt").read_text()).replace("==", " ").split()
    )
    assert set(told) == set(pinned)


def normalized(text):
    """Replace what differs from run to run."""
    for pattern, same in (
        (r"(acc|wlt|txn|hld)_[0-9A-Za-z]+", r"\1_"),
        (r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME"),
        (r"127\.0\.0\.1:\d+", "HOST"),
        (r"/\S+/wallet\.db", "wallet.db"),
    ):
        text = re.sub(pattern, same, text)
    return text.strip()


SESSIONS = re.findall(r"```console\n(.*?)```", README, re.DOTALL)


def test_session_of_commands_runs_as_it_stands_and_shows_what_comes(tmp_path):
    """With the id of the account that is made here for the one that is shown, as a reader does."""
    (session,) = [one for one in SESSIONS if "$ wallet " in one]
    lines = session.splitlines()
    commands = [line[2:] for line in lines if line.startswith("$ ")]
    program = tmp_path / "bin" / "wallet"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE}/wallet.py "$@"\n')
    program.chmod(0o700)
    settings = environment(PATH=f"{program.parent}:{os.environ['PATH']}")
    (shown_id,) = set(re.findall("acc_[0-9A-Za-z]{16}", session))
    output, made = "", shown_id
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", f"exec 2>&1\n{command.replace(shown_id, made)}"],
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
            cwd=tmp_path,
            env=settings,
        )
        output += done.stdout
        made = (re.findall("acc_[0-9A-Za-z]{16}", output) or [made])[0]
    shown = "\n".join(line for line in lines if not line.startswith("$ "))
    assert normalized(output) == normalized(shown)
    assert {one.split()[1] for one in commands} >= {"register", "topup", "charge", "verify"}


def test_readme_sessions_run_as_they_stand_and_show_what_comes(tmp_path):
    sessions = [one for one in SESSIONS if "$ wallet " not in one]
    assert len(sessions) >= 2
    with running() as url:
        token = ""
        for session in sessions:
            lines = session.replace("\\\n", "\\\0").splitlines()
            commands = "\n".join(
                line[2:].replace("\0", "\n") for line in lines if line.startswith("$ ")
            )
            shown = "\n".join(line for line in lines if not line.startswith("$ "))
            script = (
                f"TOKEN={token}\n"
                + commands.replace("http://127.0.0.1:4000", url)
                + "\necho TOKEN=$TOKEN"
            )
            done = subprocess.run(
                ["bash", "-c", f"exec 2>&1\n{script}"],
                stdout=subprocess.PIPE,
                text=True,
                timeout=60,
                cwd=tmp_path,
            )
            output, _, token = done.stdout.rpartition("TOKEN=")
            token = token.strip()
            assert normalized(output) == normalized(shown)
    assert any("insufficient_funds" in session for session in sessions[:1])


def test_versions_are_pinned_once_and_the_commands_are_the_same_everywhere():
    pinned = (HERE / "requirements.txt").read_text().split()
    names = {re.split(r"[\[=]", line)[0] for line in pinned}
    for name in names - {
        "psycopg"
    }:  # Of which the driver in C is another part, of the same version.
        needed = [Requirement(line) for line in importlib.metadata.requires(name) or []]
        assert {
            one.name.replace("-", "_")
            for one in needed
            if not one.marker or one.marker.evaluate({"extra": ""})
        } <= {one.replace("-", "_") for one in names}
    inline = re.search(
        r"# dependencies = (\[.*?\])\n# ///", (HERE / "wallet.py").read_text(), re.DOTALL
    )[1]
    assert json.loads(inline.replace("#", "")) == pinned
    developers = (HERE / "requirements-dev.txt").read_text().splitlines()
    assert developers[0] == "-r requirements.txt"
    assert all("==" in line for line in developers[1:])
    test_command = next(line for line in README.splitlines() if "requirements-dev.txt" in line)
    assert test_command in (HERE / ".ci" / "run").read_text()


@pytest.mark.slow
def test_uv_runs_the_wallet_with_what_it_says_it_needs(tmp_path):
    for name in ("wallet.py", "wallet_books.py", "wallet_cli.py", "wallet_commands.py",
                 "wallet_server.py", "wallet_times.py", "schema.sql"):
        shutil.copy(HERE / name, tmp_path)
    with served(
        python=(find_uv_bin(), "run"),
        program=(str(tmp_path / "wallet.py"),),
        cwd=tmp_path,
        PYTHONPATH="",
    ) as server:
        with urllib.request.urlopen(f"{server.url}/readyz") as answer:
            assert json.load(answer) == {"status": "ok"}
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=20) == 0
    assert (tmp_path / "wallet.db").exists()


def run_bench(*arguments, **settings):
    command = [sys.executable, str(HERE / "bench_wallet.py"), "--rounds", "1", "--seconds", "1"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60,
                          env=environment(**settings))


@pytest.mark.slow
def test_bench_says_how_to_install_what_it_needs_and_prints_ratios():
    missing = run_bench("--only", "waitress: account reads", PATH="/nowhere")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.splitlines()[-1].startswith(
        "bench: wrk is missing; install it with: apt-get install wrk"
    )
    found = json.loads(
        run_bench("--only", "in process: topups in memory", "--json", PATH="/nowhere").stdout
    )
    (row,) = found["rows"]
    assert row["ratio"] == pytest.approx(row["rate_per_s"] / row["limit"])
    assert row["least"] == row["greatest"] == row["ratio"]
    assert row["met"] == (row["ratio"] >= row["bar"])
    unknown = run_bench("--only", "no such row")
    assert unknown.stderr == "bench: no row has 'no such row' in its name\n"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed")
def test_bench_finds_in_the_books_what_was_answered_and_says_which_bars_are_missed():
    started = run_bench("--only", "fairness, waitress: beside 4 senders")
    table, _, end = started.stdout.partition("\nMissed: ")
    (line,) = [line for line in table.splitlines() if line.startswith("| fairness")]
    assert re.fullmatch(r"\| fairness, .*\| [\d,]+ ms .*<= 150 ms *\| (yes|NO) .*", line), line
    assert end.startswith("1 of 1" if "| NO" in line else "0 of 1"), started


def test_image_has_every_file_that_the_service_reads():
    dockerfile = (HERE / "Dockerfile").read_text()
    copied = set(" ".join(re.findall(r"(?m)^COPY (.*) \S+$", dockerfile)).split())
    assert copied == {
        "requirements-image.txt",
        "wallet*.py",
        "migrations/",
        "schema.sql",
        "checks.sql",
        "openapi.json",
        "openapi.yaml",
        "docs.html",
        "wallet.html",
    }


@pytest.mark.slow
def test_contract_is_valid():
    from openapi_spec_validator import validate  # Which each worker would have to load.

    validate(CONTRACT)


def test_contract_is_served(api):
    answer = api.send("GET", "/openapi.yaml", status=200)
    assert load_yaml(answer.text) == CONTRACT
    # Browsers show this. What is application/yaml they save: see tests/test_contract.py.
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    answer = api.send("GET", "/openapi.json", status=200)
    assert answer.json == CONTRACT
    assert answer.headers["Content-Type"] == "application/json"


def test_file_that_was_not_installed_is_not_found(api, monkeypatch, tmp_path):
    monkeypatch.setattr(wallet_module, "__file__", str(tmp_path / "wallet.py"))
    problem = api.send("GET", "/openapi.yaml", status=404).json
    assert problem["detail"] == "openapi.yaml is not installed beside wallet.py."


SCHEMATHESIS = """
[[operations]]
include-path = "/api/account/token"
enabled = false

[[operations]]  # It would be the end of the rest.
include-path = "/api/accounts/{account_id}/freeze"
enabled = false

[[operations]]  # Without metrics there is no such route, so that no method of it is told from another.
include-path = "/metrics"
checks.unsupported_method.enabled = false
"""

# Though valid by its form, for the money, the account, the state or an earlier request.
REFUSED = {
    "/api/transactions/topup": [201, 422],
    "/api/transactions/charge": [201, 402, 422],
    "/api/transactions/transfer": [201, 402, 404, 422],
    "/api/transactions/batch": [201, 402, 422],
    "/api/transactions/{id}/refund": [201, 404, 422],
    "/api/transactions": [200, 400, 409],
    "/api/holds": [200, 201, 400, 402, 409, 422],
    "/api/holds/{id}/capture": [201, 404, 409, 422],
    "/api/holds/{id}/release": [201, 404, 409, 422],
}

REFUSED |= {path.replace("/api", "/api/accounts/{account_id}"): REFUSED[path] for path in REFUSED}
REFUSED["/api/accounts"] = [200, 400]

SCHEMATHESIS += "".join(
    f"""
[[operations]]
include-path = "{path}"
checks.positive_data_acceptance.expected-statuses = {statuses}
"""
    for path, statuses in REFUSED.items()
)



def contract_of(issuer):
    """Return the strict contract, without the routes that are not an account's, or the issuer's."""
    contract = strict_contract()
    contract["paths"] = {
        path: item
        for path, item in contract["paths"].items()
        if path.startswith(("/api/accounts", "/api/overview")) == issuer
    }
    tags = {tag for operation in operations_of(contract).values() for tag in operation["tags"]}
    assert ("issuer" in tags) == issuer
    return contract


def run_schemathesis(folder, url, token, examples, *arguments, account_id=None):
    """Return what schemathesis says of a server, for an account or for the issuer of this one.

    Its stateful phase makes requests of what earlier answers had.
    """
    # Replacing the token would end the rest: other tests do that.
    phases = f"[phases.stateful]\ngeneration.max-examples = {5 * examples}\n"
    if (
        examples < 10
    ):  # All that is wrong on purpose would take most of the time: fuzzing sends some of it too.
        phases += '[phases.coverage]\ngeneration.mode = "positive"\n'
    if account_id:
        phases += f'[parameters]\n"path.account_id" = "{account_id}"\n'
    (folder / "schemathesis.toml").write_text(phases + SCHEMATHESIS)
    (folder / "openapi.json").write_text(json.dumps(contract_of(bool(account_id))))
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "schemathesis.cli",
            "run",
            "openapi.json",
            "--url",
            url,
            "--output-sanitize=false",
            "--max-examples",
            str(examples),
            "--no-color",
            "--seed",
            "1",
            "--header",
            f"Authorization: Bearer {token}",
            *arguments,
        ],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=3600,
        env={**os.environ, "PYTHONWARNINGS": ""},
    )


@pytest.mark.slow
@pytest.mark.parametrize("issuer_token", [None, ISSUER_TOKEN], ids=["account", "issuer"])
@pytest.mark.parametrize(
    ("examples", "options"),
    [  # With a time, it begins anew until that is over.
        (2, []),
        torture(100, ["--max-time", "240"]),
    ],
)
def test_service_keeps_to_its_contract_whatever_schemathesis_sends(
    file_wallet, tmp_path, examples, options, issuer_token, report
):
    ada, token = file_wallet.register("Ada")
    file_wallet.topup(ada.id, 10**12)
    with running(file_wallet, issuer_token) as url:
        done = run_schemathesis(
            tmp_path,
            url,
            issuer_token or token,
            examples,
            "--continue-on-failure",
            *options,
            account_id=ada.id if issuer_token else None,
        )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    generated = int(re.search(r"(\d+) generated", done.stdout)[1])
    scenarios, links = map(
        int, re.search(r"Scenarios: +(\d+)\s+API Links: +(\d+) covered", done.stdout).groups()
    )
    least = (3, 1) if examples == 2 else (50, 10)
    assert (generated > 300, scenarios >= least[0], links >= least[1]) == (True, True, True), (
        done.stdout
    )
    report(
        f"{generated:,} requests, {scenarios:,} of its scenarios, {links} links, and the contract was kept"
    )


@pytest.mark.slow
@pytest.mark.parametrize("serving", ["waitress"], indirect=True)
def test_control_a_fault_behind_an_earlier_answer_is_found_by_schemathesis(
    serving, file_wallet, tmp_path, monkeypatch
):
    def careless(wallet, account_id, hold_id, **options):
        wallet.get_hold(account_id, hold_id)
        raise RuntimeError

    monkeypatch.setattr(Wallet, "release", careless)
    ada, token = file_wallet.register("Ada")
    file_wallet.topup(ada.id, 10**12)
    with serving(file_wallet) as url:
        done = run_schemathesis(
            tmp_path,
            url,
            token,
            2,
            "--phases",
            "stateful",
            "--no-shrink",
            "--max-failures",
            "1",
            "--include-path-regex",
            "^/api/holds/.*/release|^/api/holds$",
        )
    assert (done.returncode, "Server error" in done.stdout) == (1, True), (
        done.stdout[-5000:] + done.stderr[-2000:]
    )
