"""No way to run code from a file, and no secret in what is written: looked for in the source and in real outputs."""

import ast
import logging
import re
import tomllib
import traceback
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from aceray.errors import AcerayError, ConfigError
from aceray.folder import create_run_folder
from aceray.presets import flat, load_config, to_yaml
from aceray.secrets import masked
from aceray.tracking import run as tracking_run
from aceray.tracking.run import start_tracking

PACKAGE = Path(__file__).parents[2] / "aceray"
SECRET = "hunter2-hunter2"
# calls that run code from a file, or can be made to
FORBIDDEN = {
    "eval", "exec", "compile", "pickle.load", "pickle.loads", "torch.load", "joblib.load", "dill.load", "dill.loads",
    "cloudpickle.load", "cloudpickle.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen",
    "marshal.loads", "shelve.open", "pandas.read_pickle", "pd.read_pickle",
}  # fmt: skip


def calls() -> list[tuple[str, ast.Call, str]]:
    """Every call of the package by its dotted name, and where it stands."""
    return [
        (ast.unparse(node.func), node, f"{file.relative_to(PACKAGE.parent)}:{node.lineno}")
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]


def test_nothing_that_is_read_can_run_code() -> None:
    assert [where for name, _, where in calls() if name in FORBIDDEN] == []
    loads = [(node, where) for name, node, where in calls() if name in ("np.load", "numpy.load")]
    assert loads
    for node, where in loads:
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert options.get("allow_pickle") == "False", where


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_package_that_is_needed_has_a_tested_version() -> None:
    """Those that `make audit` looks up; what is not installed here is followed no further."""
    root = PACKAGE.parent
    pinned = [line.split("==")[0] for line in (root / "constraints.txt").read_text().splitlines() if "==" in line]
    known, missing, seen = {plain(name) for name in pinned}, set(), set()
    waiting = [
        (Requirement(text), "")
        for text in tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    ]
    while waiting:
        needed, extra = waiting.pop()
        if (needed.marker and not needed.marker.evaluate({"extra": extra})) or str(needed) in seen:
            continue
        seen.add(str(needed))
        if plain(needed.name) not in known:
            missing.add(needed.name)
        try:
            further = [Requirement(text) for text in requires(needed.name) or []]
        except PackageNotFoundError:
            continue
        waiting += [(each, extra) for each in further for extra in ("", *needed.extras)]
    assert missing == set() and len(seen) > 50


def test_no_shell_is_started() -> None:
    assert [where for _, node, where in calls() if any(keyword.arg == "shell" for keyword in node.keywords)] == []


def test_mlflow_is_served_on_loopback_unless_authentication_is_on() -> None:
    """In every command that the project shows or runs."""
    root = PACKAGE.parent
    files = [file for kind in ("md", "py", "yaml", "yml", "sh", "sbatch") for file in root.rglob(f"*.{kind}")]
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    for file in [file for file in files if file != Path(__file__)]:
        for line in file.read_text(encoding="utf-8").splitlines():
            if "mlflow" in line and ("0.0.0.0" in line or "--host" in line):
                assert "127.0.0.1" in line or "basic-auth" in line, f"{file}: {line}"


@pytest.mark.parametrize(
    "uri",
    [
        f"http://me:{SECRET}@host:5000",
        f"postgresql://me:{SECRET}@host/db",
        f"https://host/mlflow?token={SECRET}",
        f"mysql+pymysql://me:{SECRET}@host/db?x=1",
    ],
)
def test_a_password_in_the_settings_is_refused_without_repeating_it(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri: holds a password; put it into the environment") as error:
        load_config(f"tracking.uri={uri}")
    assert SECRET not in "".join(traceback.format_exception(error.value))
    with pytest.raises(ConfigError) as error:
        load_config(f"tracking.uri=[{uri}]")
    assert SECRET not in str(error.value)
    assert SECRET not in masked(f"cannot reach {uri}/api, nor {uri}")


@pytest.mark.parametrize("uri", ["sqlite:////tmp/a:b@c/x.db", "http://me@host:5000", "http://host:5000/a@b?x=1"])
def test_uris_without_passwords_are_as_they_were(uri: str) -> None:
    assert load_config(f"tracking.uri={uri}").tracking.uri == uri == masked(uri)


def test_a_password_of_the_environment_is_nowhere_in_what_a_run_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, capfd
) -> None:
    """The server is not there, so that MLflow's own errors, which repeat the whole URI, are told too."""
    monkeypatch.setenv("STORE_PASSWORD", SECRET)
    monkeypatch.setattr(tracking_run, "SECONDS_TO_FINISH", 5.0)
    config = load_config(f"runs={tmp_path}", "tracking.uri=http://me:${STORE_PASSWORD}@127.0.0.1:9")
    folder = create_run_folder(config)
    with caplog.at_level(logging.DEBUG, logger="aceray"), start_tracking(config, folder, {}) as tracker:
        tracker.log(1, {"train/loss_total": 1.0})
    assert "does not answer" in caplog.text and tracker.backlog > 0
    texts = [path.read_text() for path in folder.path.rglob("*") if path.is_file()]
    assert any("${STORE_PASSWORD}" in text for text in texts)
    printed = capfd.readouterr()
    everything = [*texts, caplog.text, printed.out, printed.err, to_yaml(config), str(flat(config))]
    assert not [text for text in everything if SECRET in text]


def test_a_variable_that_is_not_set_is_named(tmp_path: Path) -> None:
    config = load_config(f"runs={tmp_path}", "tracking.uri=http://me:${NO_SUCH_VARIABLE}@127.0.0.1:9")
    with pytest.raises(AcerayError, match="the environment has no NO_SUCH_VARIABLE"):
        start_tracking(config, create_run_folder(config), {})
