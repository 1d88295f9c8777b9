"""The examples of clusters/ with values for the variables that they want."""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"
VALUES = {
    "AWS_REGION": "eu-central-1",
    "ACERAY_AMI": "ami-0123456789abcdef0",
    "ACERAY_EFS": "fs-0123456789abcdef0",
    "ACERAY_IMAGE": "registry.example/aceray:2.60.0",
    "ACERAY_INSTANCE_PROFILE": "arn:aws:iam::123456789012:instance-profile/aceray",
    "ACERAY_PROJECT": "a-project",
    "ACERAY_REGION": "europe-west4",
    "ACERAY_ZONE": "europe-west4-a",
    "ACERAY_IMAGE_OF_DISK": "projects/a-project/global/images/aceray",
    "ACERAY_SERVICE_ACCOUNT": "aceray@a-project.iam.gserviceaccount.com",
    "ACERAY_FILESTORE": "10.0.0.2:/share",
    "ACERAY_HEAD": "10.0.0.1",
    "ACERAY_WORKERS": "10.0.0.3,10.0.0.4",
    "ACERAY_SSH_USER": "aceray",
    "ACERAY_SSH_KEY": "~/.ssh/id_ed25519",
}
VARIABLE = re.compile(r"\$\{([A-Z_]+)")


def wanted(path: Path) -> list[str]:
    """Names of the variables `${NAME}` in a file."""
    return sorted(set(VARIABLE.findall(path.read_text(encoding="utf-8"))))


def render(path: Path) -> dict[str, Any]:
    """A YAML file as `envsubst` would make it; a variable without a value is a KeyError."""
    text = path.read_text(encoding="utf-8")
    return yaml.safe_load(re.sub(r"\$\{([A-Z_]+)\}", lambda found: VALUES[found[1]], text))
