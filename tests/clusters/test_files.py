"""The files of clusters/ against the validators of those who read them, and against one another."""

import configparser
import copy
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from tests.clusters.rendering import CLUSTERS, ROOT, VALUES, render, wanted

README = CLUSTERS / "README.md"
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
FILES = sorted(path for path in CLUSTERS.rglob("*") if path.is_file())
SCRIPTS = [path for path in FILES if path.read_bytes().startswith(b"#!/usr/bin/env bash")]
IMAGES = [path for path in FILES if path.name.startswith("Dockerfile")]
UNITS = [path for path in FILES if path.suffix == ".service"]
LAUNCHED = ("aws", "gcp", "on_premises")


def relative(path: Path) -> str:
    return str(path.relative_to(CLUSTERS))


def program(name: str) -> str:
    """A program that pip or Debian installed; without it the test is skipped."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name}: not installed")
    return found


def approved(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- one another


def test_one_version_of_ray_everywhere() -> None:
    """In the environment, in the constraints and wherever a file names one."""
    names = re.compile(r"(?:rayVersion: \"|\baceray:|\bray==|\bRay )(\d+\.\d+\.\d+)")
    found = {(relative(path), version) for path in FILES for version in names.findall(path.read_text(encoding="utf-8"))}
    assert {name for name, _ in found} >= {"README.md", "docker/Dockerfile", "kubernetes/base/raycluster.yaml"}
    assert {version for _, version in found} == {ray.__version__}
    assert f"\nray=={ray.__version__}\n" in CONSTRAINTS


def test_one_version_of_mlflow_everywhere() -> None:
    [version] = re.findall(r"^mlflow==(.+)$", CONSTRAINTS, re.MULTILINE)
    named = re.compile(r"mlflow(?:\[auth\])?(?:==|:)(\d+\.\d+\.\d+)")
    assert {each for path in FILES for each in named.findall(path.read_text(encoding="utf-8"))} == {version}


def test_the_readme_names_every_variable_and_every_target() -> None:
    text = README.read_text(encoding="utf-8")
    variables = {name for path in FILES if path.suffix == ".yaml" for name in wanted(path)}
    assert set(VALUES) <= variables
    assert [name for name in sorted(variables) if f"`{name}`" not in text] == []
    assert [folder.name for folder in CLUSTERS.iterdir() if folder.is_dir() and f"`{folder.name}/" not in text] == []


def test_the_readme_names_files_that_are_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (CLUSTERS / link).exists()] == []


# What gives a secret a value of its own, rather than a file's name, a variable or the name of a secret.
SECRET = re.compile(r"(?i)(?:password|token|secret_?key|access_?key)[\"']?\s*[:=]\s*[\"']?([^\s\"']+)")
HARMLESS = re.compile(r"wrong$|\$|/|~/|\{|\[|%d|token$|true$|false$|disabled$|postgres_password$")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_secret_stands_in_a_file(path: Path) -> None:
    values = SECRET.findall(path.read_text(encoding="utf-8"))
    assert [value for value in values if not HARMLESS.match(value)] == []


def test_a_secret_would_be_found() -> None:
    for line in ("password: hunter2", "RAY_AUTH_TOKEN=abc123", 'AWS_SECRET_ACCESS_KEY="abc"', "auth_token: 'x1'"):
        assert [value for value in SECRET.findall(line) if not HARMLESS.match(value)], line


# ---- shell, images, units


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_scripts(path: Path) -> None:
    approved(program("shellcheck"), "--external-sources", "--source-path", ROOT, path)


@pytest.mark.parametrize("path", IMAGES, ids=relative)
def test_images(path: Path) -> None:
    approved(program("hadolint"), path)


@pytest.mark.parametrize("path", IMAGES, ids=relative)
def test_images_copy_what_is_there(path: Path) -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for line in copied for name in line.split() if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", UNITS, ids=relative)
def test_units(path: Path, tmp_path: Path) -> None:
    """With a program that exists, which is all that is replaced."""
    text = path.read_text(encoding="utf-8")
    (tmp_path / path.name).write_text(text.replace("/opt/aceray/bin/ray", "/bin/true"))
    approved(program("systemd-analyze"), "verify", "--man=no", tmp_path / path.name)


def test_the_units_differ_in_what_they_start_alone() -> None:
    head, worker = (configparser.RawConfigParser(strict=False) for _ in range(2))
    head.read(CLUSTERS / "on_premises" / "aceray-head.service")
    worker.read(CLUSTERS / "on_premises" / "aceray-worker.service")
    sections = [{name: dict(unit[name]) for name in unit.sections()} for unit in (head, worker)]
    for unit in sections:
        assert "--block" in unit["Service"].pop("execstart")
        unit["Unit"].pop("description")
    assert sections[0] == sections[1]


def test_compose() -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    approved(program("check-jsonschema"), *schema, CLUSTERS / "docker" / "compose.yaml")


def test_compose_mounts_what_is_there() -> None:
    """Grafana's and Prometheus' files lie in dashboards/."""
    services = yaml.safe_load((CLUSTERS / "docker" / "compose.yaml").read_text(encoding="utf-8"))["services"]
    sources = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    here = [source for source in sources if source.startswith(".")]
    assert len(here) == 4
    if not (ROOT / "dashboards" / "grafana").exists():
        pytest.skip("dashboards/grafana: not there")
    assert [source for source in here if not (CLUSTERS / "docker" / source).exists()] == []


# ---- Ray's cluster launcher


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_launcher_takes_it(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(render(CLUSTERS / name / "cluster.yaml")))


def test_the_launcher_takes_the_fake_cluster() -> None:
    """The launcher has no defaults for this provider, so the file must say all."""
    from ray.autoscaler._private.util import validate_config

    validate_config(render(CLUSTERS / "fake_multinode" / "cluster.yaml"))


@pytest.mark.parametrize("name", [*LAUNCHED, "fake_multinode"])
def test_the_launcher_refuses_an_unknown_key(name: str) -> None:
    from ray.autoscaler._private.util import validate_config

    with pytest.raises(Exception, match="is_a_mistake"):
        validate_config(render(CLUSTERS / name / "cluster.yaml") | {"is_a_mistake": 1, "cluster_synced_files": []})


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_clouds_scale_to_none_and_only_workers_are_spot(name: str) -> None:
    config = render(CLUSTERS / name / "cluster.yaml")
    head, worker = config["available_node_types"]["head"], config["available_node_types"]["gpu-spot"]
    assert worker["min_workers"] == 0 < worker["max_workers"]
    spot = re.compile("spot", re.IGNORECASE)
    assert spot.search(json.dumps(worker["node_config"])) and not spot.search(json.dumps(head["node_config"]))
    assert head["resources"] == {"CPU": 0, "GPU": 0}


def test_amazon_takes_its_machines() -> None:
    if importlib.util.find_spec("botocore") is None:
        pytest.skip("botocore: not installed")
    import botocore.session
    from botocore.validate import ParamValidator

    service = botocore.session.get_session().get_service_model("ec2")
    shape: Any = service.operation_model("RunInstances").input_shape
    for kind in render(CLUSTERS / "aws" / "cluster.yaml")["available_node_types"].values():
        asked = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        assert ParamValidator().validate(asked, shape).generate_report() == ""
        assert asked["InstanceType"] in shape.members["InstanceType"].enum
        wrong = {**asked, "InstanceTyp": asked["InstanceType"]}
        assert "InstanceTyp" in ParamValidator().validate(wrong, shape).generate_report()


# ---- Kubernetes


def manifests(path: Path) -> Iterator[dict[str, Any]]:
    """The documents of a file, or of a folder as kustomize makes them."""
    text = path.read_text(encoding="utf-8") if path.is_file() else _kustomized(path)
    yield from yaml.safe_load_all(text)


def _kustomized(folder: Path) -> str:
    done = subprocess.run([program("kubectl"), "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pods(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pods of a cluster or of a job's cluster."""
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        template = group["template"]
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template.get("metadata", {})}} | {
            "spec": template["spec"]
        }


KUBERNETES = CLUSTERS / "kubernetes"
APPLIED = [
    *(path for path in sorted((KUBERNETES / "base").glob("*.yaml")) if path.name != "kustomization.yaml"),
    KUBERNETES / "job" / "rayjob.yaml",
    *(KUBERNETES / "overlays" / name for name in ("gpu", "spot")),
]


@pytest.mark.parametrize("path", APPLIED, ids=relative)
def test_kubernetes_takes_it(path: Path) -> None:
    """Kubernetes' own kinds by its schema, KubeRay's by that of its CRDs; both refuse unknown keys."""
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate: not installed").validate
    jsonschema = pytest.importorskip("jsonschema")
    schemas = json.loads(Path(__file__).with_name("kuberay-1.7.0.json").read_text(encoding="utf-8"))
    for manifest in manifests(path):
        if manifest["apiVersion"] != "ray.io/v1":
            validate(manifest, "1.34", strict=True)
            continue
        jsonschema.validate(manifest["spec"], {"$ref": f"#/{manifest['kind']}", **schemas})
        wrong = copy.deepcopy(manifest["spec"]) | {"rayVerison": "2"}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, {"$ref": f"#/{manifest['kind']}", **schemas})
        for pod in pods(manifest):
            validate(pod, "1.34", strict=True)


def test_the_base_has_all_its_files() -> None:
    named = yaml.safe_load((KUBERNETES / "base" / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    assert sorted(named) == [path.name for path in APPLIED if path.parent.name == "base"]


@pytest.mark.parametrize("path", [KUBERNETES / "base" / "raycluster.yaml", KUBERNETES / "job" / "rayjob.yaml"])
def test_pods_are_restricted_and_behind_a_token(path: Path) -> None:
    [manifest] = manifests(path)
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    assert spec["authOptions"] == {"mode": "token"}
    assert (spec["enableInTreeAutoscaling"], spec["autoscalerOptions"]["version"]) == (True, "v2")
    for pod in pods(manifest):
        [container] = pod["spec"]["containers"]
        assert (
            container["securityContext"]["runAsNonRoot"]
            and not container["securityContext"]["allowPrivilegeEscalation"]
        )
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_overlays() -> None:
    def workers(name: str) -> dict[str, Any]:
        [cluster] = [each for each in manifests(KUBERNETES / "overlays" / name) if each["kind"] == "RayCluster"]
        return cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]

    gpu, spot = workers("gpu"), workers("spot")
    for spec in (gpu, spot):
        assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nodeSelector" not in gpu and "spot" in json.dumps(spot["nodeSelector"])
    assert len(spot["tolerations"]) == len(gpu["tolerations"]) + 1
