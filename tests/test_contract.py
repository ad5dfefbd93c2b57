"""The contract: that machines read it, that it can grow, and that people can read it at /docs."""

from __future__ import annotations

import contextlib
import copy
import gzip
import importlib.util
import json
import os
import re
import shutil
import socketserver
import subprocess
import sys
import urllib.request
import wsgiref.simple_server
from concurrent.futures import ThreadPoolExecutor

import pytest
from bottle import Bottle

from tests.contract import make
from tests.support import CONTRACT, HERE, OPERATIONS, connect, in_browser, strict_contract
from wallet import Wallet, create_app

TOOLS = HERE / "tests" / "contract"
NODE_MODULES = TOOLS / "node_modules"
SCHEMAS = CONTRACT["components"]["schemas"]


def needs_node(test):
    """Leave a test that needs Node to CI, which installs its tools and skips nothing."""
    missing = not (NODE_MODULES.exists() and shutil.which("node"))
    reason = "there are no tools of Node here: (cd tests/contract && npm ci --ignore-scripts)"
    return pytest.mark.slow(pytest.mark.skipif(missing, reason=reason)(test))


def needs_generator(test):
    missing = importlib.util.find_spec("openapi_generator_cli") is None
    reason = "there is no openapi-generator: pip install -r tests/contract/requirements.txt"
    return pytest.mark.skipif(missing, reason=reason)(test)


def run(*command, **options):
    """Run a tool, which may ask nobody outside, and return what it printed."""
    quiet = {
        "DO_NOT_TRACK": "1",
        "REDOCLY_TELEMETRY": "off",
        "REDOCLY_SUPPRESS_UPDATE_NOTICE": "true",
    }
    environment = os.environ | quiet | options.pop("environment", {})
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        **options,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def tool(name, *arguments, **options):
    return run(NODE_MODULES / ".bin" / name, *arguments, **options)


# What machines stumble over #######################################################################


def nodes(node, path=""):
    """Yield each object of a document, with its path."""
    if isinstance(node, dict):
        yield path, node
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for name, child in pairs:
        if isinstance(child, (dict, list)) and name not in ("example", "examples", "x-today"):
            yield from nodes(child, f"{path}/{name}")


def stumbling_blocks(contract):
    """Yield what some generator or importer reads wrongly, with where it is."""
    for path, node in nodes(contract):
        if path.endswith("/properties"):  # Its members are names of the wallet's own.
            continue
        yield from (f"{path}/{name}" for name in ("const", "anyOf", "oneOf", "allOf") if name in node)
        if "$ref" in node and len(node) > 1:
            yield f"{path} has more than $ref"
        if not isinstance(node.get("type", ""), str):
            yield f"{path} has several types"
        if node.get("format") == "date-time" and "pattern" in node:
            yield f"{path} is compared with the text of a time"
        if node.get("nullable") and node["type"] in ("object", "array"):
            yield f"{path} is two types"
        in_place = re.fullmatch("/components/schemas/[A-Za-z]+", path) is None
        if in_place and ("enum" in node or "properties" in node):
            yield f"{path} has no name"
        if "default" in node:  # A client would send that of a field, or take it for required.
            yield f"{path} has a default"
        if node.get("in") == "header" and {"example", "examples"} & node.keys():
            yield f"{path} would be sent with every request"


def test_contract_has_nothing_that_generators_and_importers_stumble_over():
    assert list(stumbling_blocks(CONTRACT)) == []
    names = [operation["operationId"] for operation in OPERATIONS.values()]
    assert len(names) == len(set(names))
    assert all(re.fullmatch("[a-z][A-Za-z]+", name) for name in names)


@pytest.mark.parametrize(
    "block",
    [
        {"const": 1},
        {"anyOf": [{"type": "string"}]},
        {"type": ["string", "null"]},
        {"type": "string", "default": "a"},
        {"type": "string", "format": "date-time", "pattern": "Z$"},
        {"type": "object", "nullable": True},
        {"type": "object", "properties": {}},
        {"type": "string", "enum": ["a"]},
        {"$ref": "#/components/schemas/Amount", "description": "An amount."},
    ],
    ids=str,
)
def test_control_each_stumbling_block_is_found(block):
    contract = copy.deepcopy(CONTRACT)
    contract["components"]["schemas"]["Account"]["properties"]["new"] = block
    assert len(list(stumbling_blocks(contract))) == 1


def test_control_a_fixed_key_and_a_default_answer_are_found():
    contract = copy.deepcopy(CONTRACT)
    contract["components"]["parameters"]["IdempotencyKey"]["example"] = "order-17"
    contract["paths"]["/livez"]["get"]["responses"]["default"] = {}
    assert len(list(stumbling_blocks(contract))) == 2


# What can grow ####################################################################################


def used_by(parts):
    """Return the names of all schemas that these parts of the contract lead to."""
    names, todo = set(), list(parts)
    while todo:
        for _, node in nodes(todo.pop()):
            kind, _, name = node.get("$ref", "").rpartition("/")
            if name and (kind, name) not in names:
                names.add((kind, name))
                todo.append(CONTRACT["components"][kind.rpartition("/")[2]][name])
    return {name for kind, name in names if kind.endswith("schemas")}


def test_answers_are_open_and_requests_are_closed():
    answers = used_by([one["responses"] for one in OPERATIONS.values()])
    requests = used_by([one.get("requestBody", {}) for one in OPERATIONS.values()])
    assert len(answers) > 10
    for name in answers:
        for path, node in nodes(SCHEMAS[name], name):
            closing = {"enum", "pattern", "maxLength", "maxItems"} & node.keys()
            assert path.endswith("/properties") or not closing, path
            assert node.get("additionalProperties") is not False, path
    for name in requests:
        schema = SCHEMAS[name]
        assert schema["type"] != "object" or "additionalProperties" in schema, name


def test_strict_contract_finds_what_is_not_documented(api):
    from openapi_schema_validator import OAS30Validator  # Which each worker would have to load.

    def faults(name, answer):
        validator = OAS30Validator({"$ref": f"#/components/schemas/{name}", **strict})
        return [fault.validator for fault in validator.iter_errors(answer)]

    strict = {"components": strict_contract()["components"]}
    account = api.send("GET", "/api/account", status=200).json
    made = api.send("POST", "/api/transactions/topup", {"amount": 5}, status=201).json
    refused = api.send("POST", "/api/transactions/charge", {"amount": 6}, status=402).json
    for name, answer in (("Account", account), ("Transaction", made), ("Problem", refused)):
        assert faults(name, answer) == []
        assert faults(name, answer | {"since_then": 1}) == ["additionalProperties"]
    assert faults("Transaction", made | {"type": "interest"}) == ["enum"]
    assert faults("Transaction", made | {"id": "txn_1"}) == ["pattern"]
    assert faults("Problem", refused | {"code": "spending_limit_exceeded"}) == ["enum"]


class Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = True


class QuietHandler(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving_app(app):
    """Serve any application. Yield its address."""
    server = wsgiref.simple_server.make_server("127.0.0.1", 0, app, Server, QuietHandler)
    with server, ThreadPoolExecutor(1) as threads:
        threads.submit(server.serve_forever, 0.05)
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def of_later_version(app):
    """Return an application that answers as a later version of the wallet may."""

    def grow(node):
        if isinstance(node, list):
            return [grow(one) for one in node]
        if not isinstance(node, dict):
            return node
        grown = {name: grow(one) if name != "metadata" else one for name, one in node.items()}
        if node.get("description") == "of a later version":
            grown |= {"type": "interest"} if "type" in node else {"status": "pending"}
        if node.get("required") == 10**9:
            grown["code"] = "spending_limit_exceeded"
        return grown | {"since_then": {"a": [1]}}

    def serve(environ, start_response):
        def start(status, headers, exc_info=None):
            begun.extend([status, headers])

        begun = []
        content = b"".join(app(environ, start))
        status, headers = begun
        if "json" in dict(headers)["Content-Type"]:
            content = json.dumps(grow(json.loads(content))).encode()
        headers = [pair for pair in headers if pair[0] != "Content-Length"]
        start_response(status, [*headers, ("Content-Length", str(len(content)))])
        return [content]

    return serve


@pytest.fixture
def versions():
    """The addresses of this wallet, and of one of a later version."""
    with Wallet() as wallet:
        app = create_app(wallet)
        with serving_app(app) as now, serving_app(of_later_version(app)) as later:
            yield now, later


# Generators and linters ###########################################################################


def test_json_is_what_the_yaml_says():
    again = "run python -m tests.contract.make"
    assert (HERE / "openapi.json").read_text() == make.make_json(), again


@pytest.mark.slow
@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="openapi-python-client makes clients for Python 3.11"
)
def test_client_that_openapi_python_client_makes_goes_round(versions, tmp_path):
    (tmp_path / "config.json").write_text('{"post_hooks": []}')
    said = run(
        sys.executable,
        "-m",
        "openapi_python_client",
        "generate",
        "--fail-on-warning",
        "--config",
        tmp_path / "config.json",
        "--path",
        HERE / "openapi.yaml",
        "--meta",
        "none",
        "--output-path",
        tmp_path / "wallet_client",
    )
    assert "arning" not in said
    went = run(
        sys.executable,
        TOOLS / "round_trip.py",
        *versions,
        environment={"PYTHONPATH": str(tmp_path)},
    )
    assert went == "went round\n"


COMPILER_OPTIONS = {"strict": True, "target": "es2022", "module": "nodenext", "types": []}


def compile_typescript(folder, program):
    """Compile a program in TypeScript strictly. Return the file to run."""
    (folder / "program.ts").write_text(program)
    (folder / "package.json").write_text('{"type": "module"}')
    settings = {"compilerOptions": COMPILER_OPTIONS, "files": ["program.ts"]}
    (folder / "tsconfig.json").write_text(json.dumps(settings))
    (folder / "node_modules").symlink_to(NODE_MODULES)
    tool("tsc", cwd=folder)
    return folder / "program.js"


@needs_node
def test_types_that_openapi_typescript_makes_go_round(versions, tmp_path):
    contract = tmp_path / "contract.ts"
    said = tool("openapi-typescript", HERE / "openapi.yaml", "--output", contract)
    assert "arning" not in said
    program = compile_typescript(tmp_path, (TOOLS / "round_trip.ts").read_text())
    assert run("node", program, *versions) == "went round\n"


@needs_node
def test_control_types_refuse_what_the_contract_does_not_have(tmp_path):
    tool("openapi-typescript", HERE / "openapi.yaml", "--output", tmp_path / "contract.ts")
    program = (TOOLS / "round_trip.ts").read_text().replace("amount: 2000", "amont: 2000")
    with pytest.raises(AssertionError, match="'amont' does not exist"):
        compile_typescript(tmp_path, program)


@needs_node
def test_spectral_has_nothing_to_say():
    ruleset = "--ruleset", TOOLS / "spectral.yaml", "--fail-severity", "hint"
    said = tool("spectral", "lint", *ruleset, HERE / "openapi.yaml", HERE / "openapi.json")
    assert said == "No results with a severity of 'hint' or higher found!\n"


@needs_node
def test_redocly_has_nothing_to_say(tmp_path):
    said = tool("redocly", "lint", "--format", "json", HERE / "openapi.yaml", cwd=tmp_path)
    assert json.loads(said)["problems"] == []


@needs_node
def test_control_linters_find_faults(tmp_path):
    contract = copy.deepcopy(CONTRACT)
    contract["paths"]["/livez"]["get"]["operationId"] = "ready"
    wrong = tmp_path / "openapi.json"
    wrong.write_text(json.dumps(contract))
    with pytest.raises(AssertionError, match="operation-operationId-unique"):
        tool("spectral", "lint", "--ruleset", TOOLS / "spectral.yaml", wrong)
    with pytest.raises(AssertionError, match="operation-operationId-unique"):
        tool("redocly", "lint", "--format", "json", wrong, cwd=tmp_path)


@needs_node
def test_docs_are_what_the_pinned_package_makes():
    again = "run python -m tests.contract.make"
    assert (HERE / "docs.html").read_text() == make.make_docs(), again


# `type` is a reserved word of Go.
OPTIONS = {
    "go": ("--parameter-name-mappings", "type=ofType", "--model-name-mappings", "type=OfType"),
    "typescript-fetch": ("--additional-properties", "importFileExtension=.js"),
}


def generate(language, contract, folder):
    """Make a client. Return the warnings."""
    said = run(
        sys.executable,
        "-c",
        "import sys, openapi_generator_cli as cli; sys.exit(cli.cli())",
        "generate",
        *("-g", language, "-i", contract, "-o", folder),
        *OPTIONS.get(language, ()),
    )
    return [line for line in said.splitlines() if re.search("WARN|ERROR", line)]


@pytest.mark.torture
@needs_generator
@pytest.mark.parametrize("language", ["python", "typescript-fetch", "go"])
def test_openapi_generator_has_nothing_to_say(language, tmp_path):
    names = {"type": "object", "additionalProperties": {"type": "string"}}
    refer = "#/components/schemas/"
    schemas = {"Names": names, "A": {"type": "object", "properties": {"a": {"$ref": refer + "Names"}}}}
    content = {"application/json": {"schema": {"$ref": refer + "A"}}}
    responses = {"200": {"description": "It answers.", "content": content}}
    smallest = {
        "openapi": "3.0.3",
        "info": {"title": "Smallest", "version": "1"},
        "paths": {"/": {"get": {"operationId": "a", "responses": responses}}},
        "components": {"schemas": schemas},
    }
    (tmp_path / "smallest.json").write_text(json.dumps(smallest))
    said = generate(language, HERE / "openapi.yaml", tmp_path / "client")
    always = generate(language, tmp_path / "smallest.json", tmp_path / "smallest")
    # It says this of any document with an object of free names, and makes of it what is right.
    assert len(always) == 1
    assert "Failed to get the schema name: null" in always[0]
    assert said == always


@pytest.mark.torture
@needs_generator
def test_client_that_it_makes_for_python_goes_round(versions, tmp_path):
    generate("python", HERE / "openapi.yaml", tmp_path)
    program, path = TOOLS / "round_trip_generator.py", {"PYTHONPATH": str(tmp_path)}
    assert run(sys.executable, program, *versions, environment=path) == "went round\n"


@pytest.mark.torture
@needs_generator
@needs_node
def test_client_that_it_makes_for_typescript_goes_round(versions, tmp_path):
    generate("typescript-fetch", HERE / "openapi.yaml", tmp_path / "client")
    program = compile_typescript(tmp_path, (TOOLS / "round_trip_fetch.ts").read_text())
    assert run("node", program, *versions) == "went round\n"


# In a browser #####################################################################################


def test_docs_come_compressed_under_the_policy_of_the_page(serving):
    with serving() as url:
        with urllib.request.urlopen(f"{url}/docs") as answer:
            docs, body = answer.headers, answer.read()
        with urllib.request.urlopen(url) as answer:
            page = answer.headers
    assert (docs["Content-Encoding"], page["Content-Encoding"]) == ("gzip", None)
    assert gzip.decompress(body) == (HERE / "docs.html").read_bytes()
    assert len(body) < 2**19
    policies = [
        re.sub("'sha256-[^']*'", "hash", one["Content-Security-Policy"]) for one in (docs, page)
    ]
    assert policies[0] == policies[1]
    assert policies[0].count("hash") == 2


def test_client_that_reads_no_answer_gets_few_of_them(serving):
    request = b"GET /docs HTTP/1.1\r\nHost: x\r\n\r\n"
    with serving() as url, connect(url, receive_buffer_bytes=4096) as connection:
        connection.sendall(request * 200)
        answers = b"".join(iter(lambda: connection.recv(2**20), b""))
    heads = re.findall(rb"HTTP/1.1 200 OK\r\n(?s:.*?)\r\n\r\n", answers)
    assert 1 <= len(heads) < 10
    assert [b"Connection: close" in head for head in heads] == [False] * (len(heads) - 1) + [True]


class Reader:
    """Somebody who reads /docs, in the one tab that there is. Whatever goes wrong is noted."""

    def __init__(self, page, url):
        self.page, self.url, self.faults, self.asked = page, url, [], []
        self.watches = {
            "console": lambda said: said.type in ("error", "warning") and self.faults.append(said.text),
            "pageerror": lambda error: self.faults.append(str(error)),
            "request": lambda request: self.asked.append(request.url),
        }
        for event, watch in self.watches.items():
            page.on(event, watch)
        page.set_viewport_size({"width": 1440, "height": 900})
        page.goto(f"{url}/docs")
        page.locator(".opblock").first.wait_for()

    def close(self):
        for event, watch in self.watches.items():
            self.page.remove_listener(event, watch)
        self.page.goto("about:blank")

    def sign_in(self, token):
        self.page.get_by_role("button", name="Authorize").first.click()
        self.page.get_by_label("auth-bearer-value").fill(token)
        self.page.get_by_label("auth-bearer-value").press("Enter")
        self.page.get_by_role("button", name="Close").click()

    def send(self, operation):
        """Send the example of an operation. Return the status and the body of the answer."""
        block = self.page.locator(f".opblock[id$='-{operation}']")
        block.locator(".opblock-summary-control").click()
        block.get_by_role("button", name="Execute").click()
        answer = block.locator(".live-responses-table .response")
        status = answer.locator(".response-col_status").inner_text()
        return int(status.split()[0]), json.loads(answer.locator("pre code").first.inner_text())


@pytest.fixture
def read(chromium):
    """A function that opens /docs of a wallet."""
    with contextlib.ExitStack() as stack:
        yield lambda url: stack.enter_context(contextlib.closing(Reader(chromium, url)))


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize("path", ["", "/money"])
def test_docs_list_all_operations_and_send_requests_and_keep_no_token(read, path):
    with Wallet() as wallet:
        ada, token = wallet.register("Ada")
        app = outer = create_app(wallet)
        if path:
            outer = Bottle()
            outer.mount(f"{path}/", app)
        with serving_app(outer) as url:
            reader = read(url + path)
            shown = reader.page.locator(".opblock").evaluate_all(
                "(all) => all.map((one) => one.id.split('-').pop())"
            )
            assert sorted(shown) == sorted(one["operationId"] for one in OPERATIONS.values())
            assert reader.send("getWallet") == (
                200,
                {"currency": "USD", "currency_digits": 2, "has_issuer": False},
            )
            reader.sign_in(token)
            status, made = reader.send("topup")
            assert (status, made["amount"], wallet.account(ada.id).balance) == (201, 1250, 1250)
            kept = "[localStorage.length, sessionStorage.length, document.cookie, name]"
            assert reader.page.evaluate(kept) == [0, 0, "", ""]
            assert token not in reader.page.url
            reader.page.reload()
            reader.page.locator(".opblock").first.wait_for()
            assert token not in reader.page.content()
        assert reader.faults == []
        assert {one.removeprefix(url + path).partition("#")[0] for one in reader.asked} == {
            "/docs",
            "/openapi.json",
            "/api/wallet",
            "/api/transactions/topup",
        }


@in_browser
@pytest.mark.slow
def test_docs_tell_a_refusal_and_send_no_key_that_nobody_wrote(read):
    with Wallet() as wallet, serving_app(create_app(wallet)) as url:
        ada, token = wallet.register("Ada")
        reader = read(url)
        reader.sign_in(token)
        status, problem = reader.send("charge")
        assert (status, problem["code"], problem["required"]) == (402, "insufficient_funds", 250)
        wallet.topup(ada.id, 1000)
        charge = reader.page.locator(".opblock[id$='-charge']")
        for balance in (750, 500):  # With a fixed key the second would be the first again.
            with reader.page.expect_response("**/charge") as answer:
                charge.get_by_role("button", name="Execute").click()
            assert answer.value.json()["balance"] == balance


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_docs_are_light_or_dark_as_the_browser_is(read, chromium, scheme):
    chromium.emulate_media(color_scheme=scheme)
    with Wallet() as wallet, serving_app(create_app(wallet)) as url:
        reader = read(url)
        text = "getComputedStyle(document.querySelector('.info .title')).color"
        brightness = sum(map(int, re.findall(r"\d+", reader.page.evaluate(text))[:3])) / 3
        assert (brightness > 200, brightness < 80) == (scheme == "dark", scheme == "light")
    chromium.emulate_media(color_scheme="light")


@in_browser
@pytest.mark.slow
def test_control_docs_that_load_something_are_noted(read):
    main, image = '<div id="docs">', '<img src="http://127.0.0.2/x.png" alt="">'
    page = (HERE / "docs.html").read_text()
    assert page.count(main) == 1
    elsewhere = page.replace(main, image + main)

    def serve(environ, start_response):
        def start(status, headers, exc_info=None):
            plain = [one for one in headers if one[0] not in ("Content-Length", "Content-Encoding")]
            return start_response(status, plain)

        content = b"".join(app(environ, start))
        return [elsewhere.encode() if environ["PATH_INFO"] == "/docs" else content]

    with Wallet() as wallet:
        app = create_app(wallet)
        with serving_app(serve) as url:
            reader = read(url)
            assert any("violates the following Content Security Policy" in one for one in reader.faults)


@in_browser
@pytest.mark.slow
def test_browser_shows_the_contract_and_does_not_save_it(chromium):
    with Wallet() as wallet, serving_app(create_app(wallet)) as url:
        for name in ("openapi.yaml", "openapi.json"):
            assert chromium.goto(f"{url}/{name}").status == 200
            assert "Take from the balance" in chromium.locator("body").inner_text()
        chromium.goto("about:blank")


@in_browser
def test_control_browser_saves_what_is_of_type_yaml(chromium):
    def serve(environ, start_response):
        start_response("200 OK", [("Content-Type", "application/yaml")])
        return [b"openapi: 3.0.3"]

    from playwright.sync_api import Error

    with serving_app(serve) as url, pytest.raises(Error, match="Download is starting"):
        chromium.goto(url)
