"""MLflow's pages in Debian's Chromium: what a reader of a study sees there.

    python -m tests.browser sqlite:///mlflow.db RUN_ID study.png

starts a server on the database, goes from the page of a study's run to its comparison of the trials and photographs it.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import IO, Any

QUIET = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
SECONDS_TO_START = 120
SECONDS_TO_SHOW = 60


def missing() -> str:
    """What is not installed, as a reason to skip; empty when all is there."""
    programs = [name for name in ("chromium", "chromedriver") if which(name) is None]
    try:
        import selenium  # noqa: F401
    except ImportError:
        programs.append("selenium (pip install '.[dev]')")
    return f"not installed: {', '.join(programs)}" if programs else ""


def free_port() -> int:
    """A port of this machine that nothing listens on at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def mlflow_server(database: str, *arguments: str, folder: Path | None = None, **environment: str) -> Iterator[str]:
    """Address of a server of its own on a free port; it and its workers are gone afterwards.

    The database, which may have a password in it, and the environment are not to be seen in the list of processes.
    """
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", *arguments]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
            cwd=folder,
            env={**os.environ, **QUIET, "MLFLOW_BACKEND_STORE_URI": database, **environment},
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, said)
            yield f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said.seek(0)
            raise AssertionError(f"mlflow server ended: {said.read()[-2000:].decode()}")
        with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.5)
    raise AssertionError(f"{address} does not answer")


@contextlib.contextmanager
def chromium(width: int = 1400, height: int = 1000) -> Iterator[Any]:
    """A browser without a window, of the system's own driver."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = which("chromium") or ""
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # which root cannot have
    for option in ("--headless=new", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars", *sandbox):
        options.add_argument(option)
    options.add_argument(f"--window-size={width},{height}")
    driver = webdriver.Chrome(options=options, service=Service(which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def open_comparison(driver: Any, server: str, run_id: str) -> None:
    """From the page of a study's run by its link to the trials side by side, until their chart is drawn."""
    driver.get(f"{server}/#/runs/{run_id}")
    there(driver, "partial link text", "Compare the").click()
    until(driver, lambda: len(driver.window_handles) == 2)
    driver.switch_to.window(driver.window_handles[1])
    there(driver, "css selector", ".js-plotly-plot .parcoords")
    closing = driver.find_elements("css selector", "[data-component-id='mlflow.assistant.chat_panel.close']")
    for button in closing:  # MLflow's assistant takes a quarter of the page
        button.click()


def open_all_runs(driver: Any) -> None:
    """From the page of a study's run by its link to the table of all runs, in MLflow's mode for training."""
    driver.switch_to.window(driver.window_handles[0])
    there(driver, "link text", "All runs").click()
    until(driver, lambda: len(driver.window_handles) == 3)
    driver.switch_to.window(driver.window_handles[2])
    until(driver, lambda: "/runs?" in driver.current_url)


def show_metric(driver: Any, metric: str) -> None:
    """Draw that metric, alone, and no axis of the runs' names."""
    from selenium.webdriver.common.keys import Keys

    fields = driver.find_elements("css selector", "input[role=combobox]")
    shown = driver.find_elements("css selector", "[class*=select-selection-item-remove]")
    shown[-1].click()  # the one metric that is drawn at first
    for cross in shown[:-1]:
        if cross.find_element("xpath", "..").text.strip() == "name":
            cross.click()
            break
    field = fields[1]
    field.send_keys(metric, Keys.ENTER, Keys.ESCAPE)
    until(driver, lambda: metric in there(driver, "css selector", ".js-plotly-plot").text)


def there(driver: Any, by: str, name: str) -> Any:
    """The element, waited for until it is shown."""
    from selenium.webdriver.support import expected_conditions as conditions
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(driver, SECONDS_TO_SHOW).until(conditions.visibility_of_element_located((by, name)))


def until(driver: Any, holds: Any) -> None:
    """Wait until it holds."""
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(driver, SECONDS_TO_SHOW).until(lambda _: holds())


def main(database: str, run_id: str, file: str) -> None:
    """Photograph the comparison of a study's trials."""
    with mlflow_server(database) as server, chromium(1300, 1100) as driver:
        open_comparison(driver, server, run_id)
        show_metric(driver, "pose/rotation_sqfrob_mean")
        time.sleep(1.0)  # the lines move into place
        driver.save_screenshot(str(Path(file).absolute()))


if __name__ == "__main__":
    main(*sys.argv[1:])
