"""What import-linter cannot see: what is loaded when, and that a run needs neither Ray nor MLflow.

The layers themselves are contracts in pyproject.toml, checked by `lint-imports` in .ci/run.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ["torch", "ray", "mlflow", "pandas", "numpy", "matplotlib", "pyarrow"]


def python(code: str) -> str:
    """Standard output of `code` in a fresh interpreter that sees this checkout."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "statement", ["import aceray", "import aceray.cli", "import aceray; aceray.load_config('demo')"]
)
def test_light_commands_load_nothing_heavy(statement: str) -> None:
    loaded = python(f"{statement}\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])")
    assert loaded == "[]"


def test_a_run_imports_without_ray_and_mlflow() -> None:
    code = """
import sys
for name in ("ray", "mlflow"):
    sys.modules[name] = None
import aceray.build, aceray.train.loop, aceray.distributed.run, aceray.distributed.prepare, aceray.api
import aceray.distributed.study_run, aceray.tracking.study
print("imported")
"""
    assert python(code) == "imported"


def test_train_is_a_verb_and_a_package() -> None:
    code = """
import aceray, aceray.train.loop
from aceray import train
print(callable(aceray.train), aceray.train is train, hasattr(aceray.train, "loop"))
"""
    assert python(code) == "True True True"


def test_public_names() -> None:
    names = python(
        "import aceray\nprint(all(callable(getattr(aceray, name)) for name in aceray.__all__), aceray.__all__)"
    )
    expected = "True ['check', 'compare', 'evaluate', 'evaluate_half_maps', 'evaluate_with_oracle', 'export', "
    expected += "'load_config', 'load_study', 'predict', 'prepare', 'score', 'simulate', 'sync', 'train', 'tune']"
    assert names == expected
