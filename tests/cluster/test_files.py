"""What lies in cluster/ is what those would accept who read it: schemas, options, pins, and the commands in it."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import typer.testing
import yaml
from click.testing import CliRunner

from nfscale.cli.app import app
from nfscale.job import job_from_settings

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
LAUNCHER_FILES = ["aws.yaml", "gcp.yaml"]
SCRIPTS = ["local.sh", "slurm/encode.sbatch", "slurm/array.sbatch"]

pytestmark = pytest.mark.filterwarnings("ignore")

# Of sbatch(1), Slurm 23.02 and newer: what an #SBATCH line may say, with what its value must look like.
SBATCH_OPTIONS = {
    "array": r"\d+(-\d+)?([:,]\d+(-\d+)?)*(%\d+)?",
    "cpus-per-task": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+",
    "gpus-per-task": r"(\w+:)?\d+",
    "job-name": r"[\w.-]+",
    "nodes": r"\d+(-\d+)?",
    "ntasks": r"\d+",
    "ntasks-per-node": r"\d+",
    "open-mode": r"append|truncate",
    "output": r"[\w./%-]+",
    "requeue": None,
    "signal": r"([RB]+:)?(\d+|[A-Z]+\d?)(@\d+)?",
    "time": r"(\d+-)?\d+(:\d\d){0,2}",
}

# Of the Compose specification, what compose.yaml may say as far as it says anything.
COMPOSE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["services"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]*$"},
        "volumes": {"type": "object"},
        "secrets": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"file": {"type": "string"}, "environment": {"type": "string"}},
            },
        },
        "services": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "anyOf": [{"required": ["image"]}, {"required": ["build"]}],
                "properties": {
                    "build": {"type": ["string", "object"]},
                    "command": {"type": ["string", "array"], "items": {"type": "string"}},
                    "depends_on": {
                        "type": "object",
                        "additionalProperties": {
                            "properties": {
                                "condition": {
                                    "enum": ["service_started", "service_healthy", "service_completed_successfully"]
                                }
                            }
                        },
                    },
                    "environment": {"type": "object", "additionalProperties": {"type": ["string", "number", "null"]}},
                    "healthcheck": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "test": {"type": ["string", "array"]},
                            "interval": {"type": "string", "pattern": r"^\d+(ms|s|m|h)$"},
                            "timeout": {"type": "string", "pattern": r"^\d+(ms|s|m|h)$"},
                            "retries": {"type": "integer"},
                        },
                    },
                    "image": {"type": "string"},
                    "ports": {"type": "array", "items": {"type": "string", "pattern": r"^([\d.]+:)?\d+:\d+$"}},
                    "restart": {"enum": ["no", "always", "on-failure", "unless-stopped"]},
                    "secrets": {"type": "array", "items": {"type": "string"}},
                    "volumes": {"type": "array", "items": {"type": "string"}},
                },
            },
        },
    },
}


def read(name: str) -> str:
    return (CLUSTER / name).read_text()


def rayjob_documents() -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(read("kuberay/rayjob.yaml"))}


# --- schemas


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_launcher_files_have_rays_schema(name):
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    content = yaml.safe_load(read(name))
    jsonschema.validate(content, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content | {"max_worker": 3}, schema)
    nodes = content["available_node_types"]
    assert nodes["head"]["resources"] == {"CPU": 0}
    assert nodes["spot-gpu"]["min_workers"] == 0
    assert nodes["spot-gpu"]["max_workers"] == content["max_workers"]
    assert "spot" in str(nodes["spot-gpu"]["node_config"]).lower()
    assert "spot" not in str(nodes["head"]["node_config"]).lower()
    assert content["head_node_type"] == "head"


def test_the_rayjob_has_the_schema_of_its_kind():
    schema = yaml.safe_load((Path(__file__).parent / "rayjob.schema.yaml").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    job = rayjob_documents()["RayJob"]
    jsonschema.validate(job, schema)
    cluster = job["spec"]["rayClusterSpec"]
    for wrong in ({"autoscalerOption": {}}, {"rayVersion": 2.6}, {"authOptions": {"mode": "tokens"}}):
        broken = job | {"spec": job["spec"] | {"rayClusterSpec": cluster | wrong}}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema)


def test_the_rayjob_is_what_it_says():
    documents = rayjob_documents()
    spec = documents["RayJob"]["spec"]
    cluster = spec["rayClusterSpec"]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert spec["backoffLimit"] > 0
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert (workers["replicas"], workers["minReplicas"]) == (0, 0)
    assert workers["template"]["spec"]["restartPolicy"] == "Never"
    for group in (head, workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    configured = documents["ConfigMap"]
    ((file, text),) = configured["data"].items()
    assert f"/etc/nfscale/{file}" in spec["entrypoint"]
    assert head["template"]["spec"]["volumes"][0] == {
        "name": "job",
        "configMap": {"name": configured["metadata"]["name"]},
    }
    job = job_from_settings(yaml.safe_load(text), [spec["entrypoint"].split()[-1]])
    assert job.output.startswith("s3://")
    assert job.max_workers == workers["maxReplicas"]
    yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]


def test_the_compose_file_has_the_form_of_one_and_listens_on_loopback():
    content = yaml.safe_load(read("mlflow/compose.yaml"))
    jsonschema.validate(content, COMPOSE)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"services": {"server": {"images": "x"}}}, COMPOSE)
    for name, service in content["services"].items():
        assert set(service.get("secrets", ())) <= set(content["secrets"]), name
        assert {volume.split(":")[0] for volume in service.get("volumes", ())} <= set(content["volumes"]), name
        assert set(service.get("depends_on", ())) <= set(content["services"]), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name


# --- scripts


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_shell(name):
    assert subprocess.run(["bash", "-n", str(CLUSTER / name)]).returncode == 0
    checker = Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([str(checker), "--shell=bash", str(CLUSTER / name)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def sbatch_options(text: str) -> dict[str, str | None]:
    """The options that sbatch would read: of #SBATCH lines above the first command."""
    found: dict[str, str | None] = {}
    for line in text.splitlines()[1:]:
        if line.startswith("#SBATCH "):
            option = re.fullmatch(r"--([a-z-]+)(?:=(\S+))?", line.removeprefix("#SBATCH ").strip())
            assert option is not None, line
            assert option[1] not in found, line
            found[option[1]] = option[2]
        elif line.strip() and not line.startswith("#"):
            break
    assert text.count("#SBATCH ") == len(found), "an #SBATCH line below the first command is a comment"
    return found


@pytest.mark.parametrize("name", ["slurm/encode.sbatch", "slurm/array.sbatch"])
def test_sbatch_takes_the_options_of_the_batch_files(name):
    options = sbatch_options(read(name))
    assert set(options) <= set(SBATCH_OPTIONS)
    for option, value in options.items():
        form = SBATCH_OPTIONS[option]
        assert (value is None) == (form is None), option
        assert form is None or re.fullmatch(form, value), (option, value)
    assert {"requeue", "signal", "open-mode"} <= set(options)
    assert "scontrol requeue" in read(name)
    with pytest.raises(AssertionError):
        sbatch_options("#!/bin/sh\n#SBATCH --time 3\n")


def test_the_array_has_as_many_tasks_as_shares():
    first, last = sbatch_options(read("slurm/array.sbatch"))["array"].split("-")
    assert first == "0"
    assert f"SHARES={int(last) + 1} " in read("slurm/array.sbatch")


# --- pins


def test_images_have_the_ray_and_the_mlflow_that_are_pinned():
    pinned = PINS["ray"]
    assert f"ARG BASE=rayproject/ray:{pinned}-py311-gpu" in read("Dockerfile")
    assert rayjob_documents()["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"] == pinned
    tags = [tag for name in [*LAUNCHER_FILES, "kuberay/rayjob.yaml", "Dockerfile"] for tag in images(read(name))]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert len(tags) >= 4
    assert set(tags) == {f"{version}-ray{pinned}"}
    assert f"mlflow=={PINS['mlflow']} " in read("mlflow/Dockerfile")


def images(text: str) -> list[str]:
    return re.findall(r"REGISTRY/nfscale:(\S+)", text)


def test_the_image_is_built_of_what_there_is():
    copied = re.findall(r"^COPY --chown=\S+ (.+) \S+$", read("Dockerfile"), re.MULTILINE)
    sources = [source for line in copied for source in line.split()]
    assert "constraints.txt" in sources
    assert all((ROOT / source).exists() for source in sources)
    extras = re.findall(r"'\.\[([\w,]+)\]'", read("Dockerfile"))[0].split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras) <= set(project["optional-dependencies"])


# --- commands


def commands(text: str) -> set[tuple[str, str, frozenset[str]]]:
    """Calls of nfscale, ray and mlflow in a file: program, command, options."""
    text = re.sub(r"\\\n", " ", text)
    text = re.sub(r"(ray start --head .*)\n\s+(--\S+)", r"\1 \2", text)  # folded in YAML
    text = re.sub(r"(mlflow server .*)\n\s+(--.*)\n\s+(--.*)", r"\1 \2 \3", text)
    found = set()
    for call in re.findall(r"(?:^|[ `$(;])((?:nfscale|ray|mlflow) [a-z-]+\b[^;|`\n]*)", text, re.MULTILINE):
        for part in call.split(" -- "):  # of one program for another
            words = part.split()
            if words[0] in ("nfscale", "ray", "mlflow") and re.fullmatch(r"[a-z][a-z-]+", words[1]):
                options = frozenset(word.split("=")[0] for word in words[2:] if word.startswith("--"))
                found.add((words[0], words[1], options))
    return found


def help_of(program: str, command: str) -> str:
    """What `PROGRAM COMMAND --help` prints; the command line runs, in this process."""
    if program == "nfscale":
        environment = {"COLUMNS": "300", "TERM": "dumb"}
        done = typer.testing.CliRunner().invoke(app, [command, "--help"], env=environment)
    elif program == "ray":
        from ray.scripts.scripts import cli

        done = CliRunner().invoke(cli, [command, "--help"])
    else:
        from mlflow.cli import cli

        done = CliRunner().invoke(cli, [command, "--help"])
    assert done.exit_code == 0, (program, command, done.output)
    return done.output


PROSE = {("nfscale", "nfscale"), ("ray", "is"), ("nfscale", "is"), ("ray", "here"), ("ray", "stop")}
HIDDEN = {"--autoscaling-config", "--generate"}
FILES = ["README.md", "Dockerfile", "kuberay/rayjob.yaml", "mlflow/compose.yaml", *LAUNCHER_FILES, *SCRIPTS]
SLOW = ["mlflow/compose.yaml"]  # MLflow's command line imports all of MLflow


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in FILES])
def test_the_commands_in_the_files_exist_with_their_options(name):
    found = {call for call in commands(read(name)) if call[:2] not in PROSE}
    if name not in ("local.sh",):
        assert found, "a file without a command"
    for program, command, options in found:
        shown = help_of(program, command)
        if command == "symmetric-run":  # it hands the rest to `ray start`
            shown += help_of("ray", "start")
        missing = {option for option in options - HIDDEN - {"--"} if not re.search(rf"{option}\b", shown)}
        assert not missing, (program, command)


def test_the_reader_of_commands_overlooks_none():
    text = 'srun ray symmetric-run --address x \\\n --num-cpus 2 -- nfscale encode "$@" --shards 1/2 &\n'
    text += "# `mlflow server --host`"
    assert commands(text) == {
        ("ray", "symmetric-run", frozenset({"--address", "--num-cpus"})),
        ("nfscale", "encode", frozenset({"--shards"})),
        ("mlflow", "server", frozenset({"--host"})),
    }


def test_nothing_is_shown_beyond_loopback_without_a_token():
    for name in FILES:
        assert "dashboard-host=0.0.0.0" not in read(name)
        assert "dashboard-host: 0.0.0.0" not in read(name)
    for name in LAUNCHER_FILES:
        assert "--env RAY_AUTH_MODE=token" in yaml.safe_load(read(name))["docker"]["run_options"]
    assert "export RAY_AUTH_MODE=token" in read("slurm/encode.sbatch")
    assert "RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}" in read("local.sh")
