"""How it is deployed: the image and its health, the exit codes and who restarts what, Kubernetes."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile

import pytest
from packaging.requirements import Requirement

import wallet as wallet_module
import wallet_cli
from tests.support import (
    HERE,
    ISSUER_TOKEN,
    MODULE,
    PAGES,
    ROUTES,
    command,
    environment,
    files_cannot_grow,
    free_port,
    load_yaml,
    log_lines,
    read_start,
    send,
    served,
)
from wallet import ConfigurationError, NotReady, Wallet

DOCKERFILE = re.sub(r"\\\n", "", (HERE / "Dockerfile").read_text())
COMPOSE = load_yaml((HERE / "compose.yaml").read_text())

# The image #########################################################################################


def command_of(instruction):
    """Return a command of the Dockerfile, which has the form that needs no shell."""
    (text,) = re.findall(rf"(?m)^{instruction}\b.*?(\[.*\])$", DOCKERFILE)
    return json.loads(text)


def in_image():
    """Return the environment that the image sets."""
    (text,) = re.findall(r"(?m)^ENV (.*)$", DOCKERFILE)
    return dict(one.split("=", 1) for one in text.split())


def pinned(name):
    """Return the versions that a file of requirements pins, and how many hashes each has."""
    text = re.sub(r"\\\n", "", (HERE / name).read_text())
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    versions = {}
    for requirement, *hashes in lines:
        assert all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", one) for one in hashes)
        package, version = requirement.split("==")
        package = re.sub(r"\[.*\]", "", package).replace("_", "-")
        assert package not in versions
        versions[package] = (version, len(set(hashes)))
    return versions


def test_base_of_the_image_is_fixed_by_its_digest_and_its_user_is_a_number_and_not_root():
    (base,) = re.findall(r"(?m)^FROM (.*)$", DOCKERFILE)
    assert re.fullmatch(r"python:3\.13\.\d+-slim-\w+@sha256:[0-9a-f]{64}", base)
    instructions = re.findall(r"(?m)^([A-Z]+) (.*)$", DOCKERFILE)
    user = dict(instructions)["USER"]
    assert re.fullmatch(r"[1-9][0-9]*:[1-9][0-9]*", user)
    after = instructions[instructions.index(("USER", user)) + 1 :]
    assert {name for name, _ in after} == {"VOLUME", "EXPOSE", "ENV", "HEALTHCHECK", "CMD"}
    uid, gid = user.split(":")
    assert f"--gid {gid} wallet" in DOCKERFILE
    assert f"--uid {uid} --gid wallet" in DOCKERFILE


def test_packages_of_the_image_are_those_of_requirements_txt_and_what_they_need_each_with_hashes():
    assert "RUN pip install --no-cache-dir --no-compile --require-hashes -r requirements-image.txt" in (
        DOCKERFILE.splitlines())
    image, asked = pinned("requirements-image.txt"), pinned("requirements.txt")
    assert all(hashes >= 2 for _, hashes in image.values())  # A wheel, and the source.
    assert {name: image[name][0] for name in asked} == {name: asked[name][0] for name in asked}
    needed, todo = set(), [Requirement(line) for line in (HERE / "requirements.txt").read_text().split()]
    linux = {"python_version": "3.13", "python_full_version": "3.13.0", "sys_platform": "linux",
             "platform_system": "Linux", "os_name": "posix", "implementation_name": "cpython"}
    while todo:
        one = todo.pop()
        needed.add(one.name.replace("_", "-"))
        for line in importlib.metadata.requires(one.name) or []:
            other = Requirement(line)
            if not other.marker or any(other.marker.evaluate(linux | {"extra": extra})
                                       for extra in ("", *one.extras)):
                todo.append(other)
    assert set(image) == needed
    first = (HERE / "requirements-image.txt").read_text().partition("\nbottle")[0]
    assert "uv pip compile requirements.txt --generate-hashes --python-version 3.13" in first
    assert not re.search(r"https?:|index", (HERE / "requirements-image.txt").read_text())


@pytest.mark.torture
@pytest.mark.parametrize("processor", ["x86_64", "aarch64"])
def test_every_package_of_the_image_has_a_wheel_with_a_hash_on_each_processor(tmp_path, processor):
    names = [f"--platform=manylinux{one}_{processor}" for one in ("2014", "_2_28")]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
         "--require-hashes", "--python-version=3.13", *names, "--dest", tmp_path,
         "--requirement", HERE / "requirements-image.txt"],
        check=True,
        timeout=300,
    )  # fmt: skip
    found = {re.sub("[_-]+", "-", path.name.split("-")[0]) for path in tmp_path.iterdir()}
    assert found == set(pinned("requirements-image.txt"))


def check_health(**settings):
    """Run the image's HEALTHCHECK, with nothing else in the environment. Return its exit code."""
    python, *rest = command_of("HEALTHCHECK")
    assert python == "python"
    done = subprocess.run(
        [sys.executable, *rest], env=settings, stderr=subprocess.PIPE, text=True, timeout=30
    )
    assert (done.returncode == 0) == (done.stderr == "")
    return done.returncode


def dead_proxy():
    """Return settings that name a proxy at which nobody listens."""
    url = f"http://127.0.0.1:{free_port()}"
    return dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"), url)


@pytest.mark.parametrize("host", [None, "127.0.0.1", "0.0.0.0", "::1", "::"])
def test_health_is_asked_of_the_wallet_itself_wherever_it_listens_and_of_no_proxy(tmp_path, host):
    settings = {"WALLET_HOST": host} if host else {}
    with served(cwd=tmp_path, WALLET_ISSUER_TOKEN=ISSUER_TOKEN, **settings) as server:
        settings["WALLET_PORT"] = server.url.rpartition(":")[2]
        assert check_health(**settings) == 0
        assert check_health(**settings, **dead_proxy()) == 0
        server.terminate()
        assert server.wait(timeout=30) == 0
    assert check_health(**settings) == 1


def test_health_fails_while_the_wallet_lives_and_is_not_ready(tmp_path):
    with served(cwd=tmp_path) as server:
        port = server.url.rpartition(":")[2]
        assert check_health(WALLET_PORT=port) == 0
        (tmp_path / "wallet.db").rename(tmp_path / "away.db")
        assert send(server.url, "GET", "/livez")[0] == 200
        assert send(server.url, "GET", "/readyz")[0] == 503
        assert check_health(WALLET_PORT=port) == 1
        (tmp_path / "away.db").rename(tmp_path / "wallet.db")
        assert check_health(WALLET_PORT=port) == 0


@pytest.mark.slow
def test_health_fails_where_nothing_is_answered():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        assert check_health(WALLET_PORT=str(silent.getsockname()[1])) == 1


@pytest.mark.parametrize("name", ["wallet", "postgres"])
def test_containers_of_compose_write_to_nothing_but_their_data_and_have_no_rights(name):
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "/tmp" in service["tmpfs"]


def test_container_of_the_recipe_has_what_compose_gives_it():
    recipe = " ".join(re.search(r"docker run -d .*?wallet\n", PAGES["operating.md"], re.DOTALL)[0].split())
    for flags in ("--read-only", "--tmpfs /tmp", "--cap-drop ALL", "--security-opt no-new-privileges"):
        assert f" {flags} " in recipe


def test_wallet_that_can_write_no_temporary_file_says_so_at_its_start(monkeypatch):
    """Else it would be ready, and each batch in SQLite a 503."""
    monkeypatch.setattr(tempfile, "tempdir", None)  # It is remembered.
    with files_cannot_grow(), pytest.raises(ConfigurationError) as refused:
        wallet_cli.open_served(wallet_cli.load_settings({"dsn": "sqlite://"}))
    assert not isinstance(refused.value, NotReady)
    assert re.fullmatch(
        r"No usable temporary directory found in \['/.*'\]: make /tmp writable, or name a folder in"
        " TMPDIR", str(refused.value))


# Exit codes, and who is started again ##############################################################

UNIT = re.search(r"(?ms)^```ini\n(.*?)^```", PAGES["operating.md"])[1]
SERVICE = dict(re.findall(r"(?m)^(\w+)=(.*)$", UNIT))


class Supervisor:
    """Starts a wallet again and again, as systemd does with the unit of docs/operating.md."""

    def __init__(self, *arguments, **settings):
        self.command = [sys.executable, *MODULE, "--port", "0", *arguments]
        self.settings, self.codes = settings, []
        self.process = self.told = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=30)

    def start(self):
        """Start it once. Return its URL, or None when it has exited."""
        self.process = subprocess.Popen(
            self.command, stderr=subprocess.PIPE, text=True, env=environment(**self.settings)
        )
        url, self.told = read_start(self.process)
        if not url:
            self.process.communicate(timeout=30)
            self.codes.append(self.process.returncode)
        return url

    def has_given_up(self):
        assert SERVICE["Restart"] == "always"
        kept_down = map(int, SERVICE["RestartPreventExitStatus"].split())
        return bool(self.codes) and self.codes[-1] in kept_down


def assert_is_restarted(supervisor, mend):
    """See that it is started again until what is wrong is mended, and serves then."""
    for _ in range(2):
        assert supervisor.start() is None
        assert not supervisor.has_given_up(), supervisor.told
        assert re.fullmatch(r"wallet: [^\n]+\n", supervisor.told)
    assert supervisor.codes == [75, 75]
    mend()
    url = supervisor.start()
    assert url, supervisor.told
    assert send(url, "GET", "/readyz")[0] == 200


@pytest.mark.parametrize(
    "settings",
    [
        {"WALLET_THREADS": "many"},
        {"WALLET_ISSUER_TOKEN": ""},
        {"WALLET_DSN": "mongodb://x"},
        {"WALLET_DSN": "postgresql://h/x?no_such_option=1"},
        {"WALLET_DSN": "sqlite://", "WALLET_CURRENCY": "dollars"},
        {"WALLET_DSN": "sqlite://", "WALLET_HOST": "no such host"},
    ],
    ids=lambda settings: list(settings)[-1],
)
def test_wallet_with_a_wrong_setting_is_not_started_again(settings):
    with Supervisor(**settings) as supervisor:
        assert supervisor.start() is None
        assert (supervisor.codes, supervisor.has_given_up()) == ([2], True), supervisor.told


def test_wallet_whose_file_is_no_wallet_is_not_started_again(tmp_path):
    (tmp_path / "wallet.db").write_bytes(b"not a database" * 100)
    with Supervisor(WALLET_DSN=f"sqlite:///{tmp_path}/wallet.db") as supervisor:
        assert supervisor.start() is None
        assert supervisor.has_given_up(), supervisor.told


def test_wallet_is_started_again_until_its_port_is_free():
    with contextlib.ExitStack() as taken:
        other = taken.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = str(other.getsockname()[1])
        with Supervisor("--port", port, WALLET_DSN="sqlite://") as supervisor:
            assert_is_restarted(supervisor, taken.close)


@pytest.mark.parametrize("must_exist", ["0", "1"])
def test_wallet_is_started_again_until_its_disk_is_mounted(tmp_path, must_exist):
    Wallet(f"sqlite:///{tmp_path}/unmounted.db").close()
    settings = {"WALLET_DSN": f"sqlite:///{tmp_path}/disk/wallet.db"}

    def mount():
        (tmp_path / "disk").mkdir()
        (tmp_path / "unmounted.db").rename(tmp_path / "disk" / "wallet.db")

    with Supervisor(WALLET_MUST_EXIST=must_exist, **settings) as supervisor:
        assert_is_restarted(supervisor, mount)


def test_wallet_is_started_again_until_there_is_one_in_its_database(durable_dsn):
    settings = {"WALLET_DSN": durable_dsn, "WALLET_MUST_EXIST": "1"}
    with Supervisor(**settings) as supervisor:
        assert_is_restarted(supervisor, lambda: command("init", **settings).check_returncode())


@pytest.mark.slow
def test_wallet_is_started_again_until_its_file_is_not_locked(file_dsn):
    with contextlib.ExitStack() as held:
        held.enter_context(Wallet(file_dsn, alone=True))
        with Supervisor(WALLET_DSN=file_dsn) as supervisor:
            assert_is_restarted(supervisor, held.close)


def test_wallet_is_started_again_until_postgres_answers(postgres_server, postgres_dsn):
    Wallet(postgres_dsn).close()
    postgres_server.control("stop", "-m", "fast")
    try:
        with Supervisor(WALLET_DSN=postgres_dsn) as supervisor:
            assert_is_restarted(supervisor, postgres_server.restart)
    finally:
        postgres_server.restart()


def test_wallet_that_a_fault_ends_is_started_again():
    settings = environment(WALLET_DSN="sqlite://", WALLET_PORT="0", PYTHONWARNINGS="")
    options = {"env": settings, "stderr": subprocess.PIPE, "text": True, "timeout": 60}
    faulty = "import sys, wallet, wallet_cli as cli; cli._pin_process = None; sys.exit(cli.main())"
    fault = subprocess.run([sys.executable, "-c", faulty], stdout=subprocess.PIPE, **options)
    assert (fault.returncode, fault.stdout) == (75, "")
    (line,) = map(json.loads, fault.stderr.splitlines())
    assert (line["message"], line["level"]) == ("a fault of the wallet", "ERROR")


def test_commands_that_could_not_be_done_exit_with_2_whatever_may_pass(tmp_path):
    for arguments in (["init"], ["verify"], ["accounts"], ["backup", str(tmp_path / "backup.db")]):
        done = command(*arguments, "--dsn", f"sqlite:///{tmp_path}/disk/wallet.db")
        assert (done.returncode, done.stdout) == (2, ""), done.stderr


def test_embedder_can_tell_what_may_pass_from_what_stays(tmp_path):
    with pytest.raises(NotReady):
        Wallet(f"sqlite:///{tmp_path}/disk/wallet.db")
    with pytest.raises(ConfigurationError) as stays:
        Wallet("mongodb://x")
    assert not isinstance(stays.value, NotReady)


def verify_unit(folder, unit):
    """Return what systemd says of a unit."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze: apt install systemd")
    file = folder / "wallet.service"
    unit = unit.replace("/opt/wallet/.venv/bin/python", sys.executable)
    file.write_text(unit.replace("/opt/wallet", str(folder)))
    done = subprocess.run(
        ["systemd-analyze", "verify", file], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    return done.stderr


def test_systemd_knows_every_key_of_the_unit(tmp_path):
    assert verify_unit(tmp_path, UNIT) == ""


def test_control_systemd_names_a_key_that_it_does_not_know(tmp_path):
    misspelt = UNIT.replace("RestartPreventExitStatus", "RestartPreventsExitStatus")
    assert "Unknown key" in verify_unit(tmp_path, misspelt)


# Kubernetes ########################################################################################

# What Kubernetes puts into a pod for a Service named wallet, and one named wallet-postgres.
OF_SERVICES = {
    "WALLET_SERVICE_HOST": "10.0.0.1",
    "WALLET_SERVICE_PORT": "4000",
    "WALLET_SERVICE_PORT_HTTP": "4000",
    "WALLET_PORT": "tcp://10.0.0.1:4000",
    "WALLET_PORT_4000_TCP": "tcp://10.0.0.1:4000",
    "WALLET_PORT_4000_TCP_PROTO": "tcp",
    "WALLET_PORT_4000_TCP_PORT": "4000",
    "WALLET_PORT_4000_TCP_ADDR": "10.0.0.1",
    "WALLET_POSTGRES_SERVICE_HOST": "10.0.0.2",
    "WALLET_POSTGRES_SERVICE_PORT": "5432",
    "WALLET_POSTGRES_PORT": "tcp://10.0.0.2:5432",
    "WALLET_POSTGRES_PORT_5432_TCP": "tcp://10.0.0.2:5432",
    "WALLET_POSTGRES_PORT_5432_TCP_ADDR": "10.0.0.2",
}
IGNORED = (
    "WARNING wallet: WALLET_PORT is {}, where Kubernetes has a Service named wallet: it is no"
    " setting, and is ignored (enableServiceLinks: false leaves it out)"
)


@pytest.mark.parametrize("address", ["tcp://10.0.0.1:4000", "tcp://[fd00::1]:4000"])
def test_port_of_a_kubernetes_service_is_ignored_with_one_line(address):
    settings = {**OF_SERVICES, "WALLET_PORT": address}
    # An address of this process's own, so that the port 4000 is free there.
    host = "127.{}.{}.{}".format(*(os.getpid() + 2**16).to_bytes(3, "big"))
    process = subprocess.Popen(
        [sys.executable, *MODULE, "--dsn", "sqlite://", "--host", host],
        stderr=subprocess.PIPE, text=True, env=environment(**settings),
    )  # fmt: skip
    try:
        url, told = read_start(process)
        assert url == f"http://{host}:4000"
        assert check_health(WALLET_HOST=host, **settings) == 0
    finally:
        process.send_signal(signal.SIGTERM)
        told += process.communicate(timeout=30)[1]
    assert process.returncode == 0
    warnings = [line for line in log_lines(told) if line.startswith("WARNING")]
    assert warnings == [IGNORED.format(address)]


@pytest.mark.parametrize(
    "value",
    ["udp://10.0.0.1:4000", "tcp://wallet:4000", "tcp://10.0.0.1", "tcp://10.0.0.1:4000/", "4000x",
     "tcp://10.0.0.1:4000\n"],
)  # fmt: skip
def test_port_in_any_other_form_is_refused(refusal, value):
    assert "WALLET_PORT" in refusal("--dsn", "sqlite://", WALLET_PORT=value)


def test_option_may_not_be_the_address_of_a_service_and_comes_before_it(refusal, monkeypatch):
    assert "must be an integer" in refusal("--port", OF_SERVICES["WALLET_PORT"])
    monkeypatch.setenv("WALLET_PORT", OF_SERVICES["WALLET_PORT"])
    assert wallet_cli.load_settings({"port": "4001"})["port"] == 4001
    assert wallet_cli.load_settings()["port"] == 4000


def test_variables_that_only_look_like_those_of_a_service_are_named(file_dsn):
    Wallet(file_dsn).close()
    typed = {"WALLET_SERVICE_PORT": "4000", "WALLET_PORT_4000_TCP": "x", "WALLET_SHOP_PORT": "1"}
    done = command("accounts", WALLET_DSN=file_dsn, **typed)
    (line,) = log_lines(done.stderr)
    assert all(name in line for name in typed)
    done = command("accounts", WALLET_DSN=file_dsn, **OF_SERVICES, WALLET_POSTGRES="x")
    assert log_lines(done.stderr) == [
        IGNORED.format(OF_SERVICES["WALLET_PORT"]),
        "WARNING wallet: these variables are unknown, and do nothing: WALLET_POSTGRES",
    ]


def documents(name):
    """Return the documents of a file in docs/."""
    text = (HERE / "docs" / name).read_text()
    return [load_yaml(part) for part in re.split(r"(?m)^---$", text)]


DEPLOYMENT, SERVICE_OF_PODS, BUDGET = documents("kubernetes.yaml")
(JOB,) = documents("kubernetes-init.yaml")
POD = DEPLOYMENT["spec"]["template"]
SECRETS = {"issuer-token": ISSUER_TOKEN}


def container_of(workload):
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    return container


def settings_of(container, **secrets):
    """Return the environment of a container, with what the image sets."""
    given = {
        one["name"]: one.get("value") or secrets[one["valueFrom"]["secretKeyRef"]["key"]]
        for one in container["env"]
    }
    return in_image() | given


@pytest.mark.parametrize("version", ["1.31", "1.34", "1.37"])
def test_manifests_are_what_kubernetes_knows(version):
    from kubernetes_validate import validate  # Which each worker would have to load.

    manifests = [DEPLOYMENT, SERVICE_OF_PODS, BUDGET, JOB]
    assert [one["kind"] for one in manifests] == [
        "Deployment", "Service", "PodDisruptionBudget", "Job"]  # fmt: skip
    for one in manifests:
        validate(one, version, strict=True)


def test_control_a_member_of_a_manifest_that_is_misspelt_is_found():
    from kubernetes_validate import ValidationError, validate

    for wrong in ({"readOnlyRootFileSystem": True}, {"readOnlyRootFilesystem": "yes"}):
        manifest = copy.deepcopy(DEPLOYMENT)
        container_of(manifest)["securityContext"] |= wrong
        with pytest.raises(ValidationError):
            validate(manifest, "1.37", strict=True)


def test_pods_stay_up_through_updates_and_drains():
    spec = DEPLOYMENT["spec"]
    assert spec["replicas"] == 2
    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert BUDGET["spec"]["maxUnavailable"] == 1
    labels = POD["metadata"]["labels"].items()
    for selector in (
        spec["selector"]["matchLabels"],
        SERVICE_OF_PODS["spec"]["selector"],
        BUDGET["spec"]["selector"]["matchLabels"],
        POD["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels
    drain_s = int(settings_of(container_of(DEPLOYMENT), dsn="x", **SECRETS)["WALLET_DRAIN_S"])
    stop_s = POD["spec"]["terminationGracePeriodSeconds"]
    assert drain_s > 2 * container_of(DEPLOYMENT)["readinessProbe"]["periodSeconds"]
    assert stop_s > drain_s + 15  # What a wallet takes at most to stop.


@pytest.mark.parametrize("workload", [DEPLOYMENT, JOB], ids=["pods", "job"])
def test_pods_have_no_rights_and_agree_with_the_image(workload):
    spec, container = workload["spec"]["template"]["spec"], container_of(workload)
    uid, gid = map(int, dict(re.findall(r"(?m)^(USER) (.*)$", DOCKERFILE))["USER"].split(":"))
    context = spec["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"], context["runAsNonRoot"]) == (uid, gid, True)
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is spec["enableServiceLinks"] is False
    assert container["image"].endswith(f"/wallet:{wallet_module.__version__}")
    assert {"memory"} <= container["resources"]["limits"].keys()
    # No secret stands in the manifest, and each other variable is a setting.
    values = {one["name"] for one in container["env"] if "value" in one}
    assert values <= {"WALLET_MUST_EXIST", "WALLET_DRAIN_S"}
    known = {one.variable for one in wallet_cli.SETTINGS}
    assert {one["name"] for one in container["env"]} <= known


def test_probes_ask_routes_that_need_no_token_at_the_port_of_the_image():
    container = container_of(DEPLOYMENT)
    assert container["ports"] == [{"name": "http", "containerPort": 4000}]
    assert SERVICE_OF_PODS["spec"]["ports"] == [
        {"name": "http", "port": 4000, "targetPort": "http"}]
    assert re.search(r"(?m)^EXPOSE 4000$", DOCKERFILE)
    assert next(one.default for one in wallet_cli.SETTINGS if one.name == "port") == "4000"
    asked = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {one["port"] for one in asked.values()} == {"http"}
    paths = {name: one["path"] for name, one in asked.items()}
    assert paths == {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"}
    assert {f"GET {path}" for path in paths.values()} <= set(ROUTES)
    volumes = {one["name"]: one for one in POD["spec"]["volumes"]}
    assert [(one["name"], one["mountPath"]) for one in container["volumeMounts"]] == [("tmp", "/tmp")]
    assert "emptyDir" in volumes["tmp"]


def test_job_makes_the_tables_once_and_then_the_pods_serve(postgres_dsn, tmp_path):
    def run_pod(workload):
        container = container_of(workload)
        settings = settings_of(container, dsn=postgres_dsn, **SECRETS)
        program, *arguments = container.get("command") or command_of("CMD")
        assert (program, arguments[0]) == ("python", "wallet.py")
        return arguments[1:], {name: text for name, text in settings.items()
                               if name in {one.variable for one in wallet_cli.SETTINGS}}

    arguments, settings = run_pod(DEPLOYMENT)
    early = command(*arguments, "--port", "0", **settings)
    assert (early.returncode, "let the command init make" in early.stderr) == (75, True)
    step, its_settings = run_pod(JOB)
    for told in ("is now a wallet in USD", "was already a wallet in USD"):
        made = command(*step, **its_settings)
        assert (made.returncode, told in made.stdout) == (0, True), made.stderr
    with (served(*arguments, cwd=tmp_path, **settings) as one,
          served(*arguments, cwd=tmp_path, **settings) as other):
        account = send(one.url, "POST", "/api/register", {"name": "Ada"}, ISSUER_TOKEN)
        assert account[0] == 201
        assert send(other.url, "GET", "/api/account", token=account[2]["token"])[0] == 200
        probe = container_of(DEPLOYMENT)["readinessProbe"]["httpGet"]["path"]
        assert [send(pod.url, "GET", probe)[0] for pod in (one, other)] == [200, 200]
        assert check_health(WALLET_PORT=one.url.rpartition(":")[2], WALLET_HOST="0.0.0.0") == 0
    assert list(tmp_path.iterdir()) == []


# Who reaches it ####################################################################################


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "127.0.0.1", "127.1.2.3", "localhost", "::1"])
@pytest.mark.parametrize("issuer", [False, True])
def test_wallet_that_others_reach_without_an_issuer_says_what_anyone_can_do(tmp_path, host, issuer):
    settings = {"WALLET_ISSUER_TOKEN": ISSUER_TOKEN} if issuer else {}
    with served("--host", host, "--dsn", "sqlite://", cwd=tmp_path, **settings) as server:
        server.send_signal(signal.SIGTERM)
        log = server.communicate(timeout=30)[1]
    warnings = [line for line in log_lines(log) if line.startswith("WARNING")]
    assert warnings == [
        f"WARNING wallet: it listens on {host}, and there is no issuer: whoever reaches it can make"
        " accounts and fill them with any amount. Set WALLET_ISSUER_TOKEN, or let a proxy admit"
        " only your own services"
    ] * (host in ("0.0.0.0", "::") and not issuer)
