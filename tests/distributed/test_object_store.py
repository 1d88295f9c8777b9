"""Datasets, STAR files and stacks on object stores: a real S3 server where moto is installed, a stand-in everywhere."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs

import aceray
from aceray.data import location as places
from aceray.data.location import RemotePath, location, remote_trouble
from aceray.data.particles import open_particles
from aceray.errors import DataError
from tests.data.conftest import children
from tests.data.inputs import some_images, write_stack, write_star
from tests.distributed.conftest import QUICK
from tests.distributed.particles import write_particles

SECRET = "wJalrXUtnFEMI-not-to-be-told"


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """The query of an S3 server in this process."""
    server = pytest.importorskip("moto.server", reason="needs moto, an extra of dev").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    server.start()
    yield f"endpoint_override=127.0.0.1:{server.get_host_and_port()[1]}&scheme=http&region=us-east-1"
    server.stop()


@pytest.fixture(params=["stand-in", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    """A bucket, empty."""
    places._file_system.cache_clear()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    if request.param == "stand-in":
        (tmp_path / "store" / "bucket").mkdir(parents=True)
        files = fs.SubTreeFileSystem(str(tmp_path / "store"), fs.LocalFileSystem())
        monkeypatch.setattr(places, "_file_system", lambda scheme, bucket, query: files)
        return RemotePath("s3", "bucket")
    name = f"bucket-{abs(hash(tmp_path)) % 10**9}"
    query = request.getfixturevalue("s3_server")
    fs.FileSystem.from_uri(f"s3://{name}?{query}&allow_bucket_creation=true")[0].create_dir(name)
    found = location(f"s3://{name}?{query}")
    assert isinstance(found, RemotePath)
    return found


@pytest.fixture
def star(tmp_path: Path) -> Path:
    """801 particles of two stacks in a folder of their own."""
    counts = {"a.mrcs": 500, "b.mrcs": 301}
    for name, count in counts.items():
        write_stack(tmp_path / "in" / "stacks" / name, some_images(count, seed=count))
    names = [f"{index + 1}@stacks/{name}" for name, count in counts.items() for index in range(count)]
    return write_star(tmp_path / "in" / "p.star", names)


def uploaded(folder: Path, store: RemotePath) -> RemotePath:
    for file in folder.rglob("*"):
        if file.is_file():
            (store / str(file.relative_to(folder))).upload(file)
    return store


def contents(folder: RemotePath, ending: str = ".parquet") -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in folder.sizes() if name.endswith(ending)}


def test_stacks_on_a_store_become_the_same_dataset_there(store: RemotePath, star: Path, tmp_path: Path) -> None:
    here = aceray.prepare(star, tmp_path / "set", box=12, shard_mib=1)
    remote = uploaded(star.parent, store / "input")
    made = aceray.prepare(str(remote / "p.star"), str(store / "sets" / "one"), box=12, shard_mib=1)
    local = {name: text for name, text in children(here.path).items() if name.endswith(".parquet")}
    assert contents(made.path) == local
    assert {"manifest.json", "report.md", "refused.csv", "source.star", "particles.png"} <= set(made.path.sizes())
    assert list((store / "sets").sizes()) == ["one"]
    particles = open_particles(str(made.path))
    particles.verify()
    assert particles.manifest.particles == 801
    table = particles.read(particles.row_groups(), ["stack_name", "stack_index"])
    assert table.equals(open_particles(here.path).read(particles.row_groups(), ["stack_name", "stack_index"]))
    with pytest.raises(DataError, match="not empty"):
        aceray.prepare(str(remote / "p.star"), str(store / "sets" / "one"), box=12)
    aceray.prepare(str(remote / "p.star"), str(store / "sets" / "one"), existing="keep", box=12, shard_mib=1)
    aceray.prepare(str(remote / "p.star"), str(store / "sets" / "one"), existing="overwrite", box=8)
    assert open_particles(str(made.path)).manifest.box == 8


def test_a_conversion_to_a_store_that_was_stopped_goes_on(store, star, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("aceray.data.convert.ROWS_PER_GROUP", 256)
    monkeypatch.setattr(
        "aceray.data.convert.Conversion.shards",
        property(lambda plan: [range(s, min(s + 256, len(plan.table))) for s in range(0, len(plan.table), 256)]),
    )
    local = aceray.prepare(star, tmp_path / "set").path
    whole = {name: text for name, text in children(local).items() if name.endswith(".parquet")}

    def stop(progress) -> None:
        if progress.shards_done == 2:
            raise KeyboardInterrupt

    out = store / "set"
    with pytest.raises(KeyboardInterrupt):
        aceray.prepare(star, str(out), on_progress=stop)
    assert len(contents(out)) == 2
    with pytest.raises(DataError, match=r"holds no manifest\.json"):
        open_particles(out)
    with pytest.raises(DataError, match="unfinished conversion of other settings"):
        aceray.prepare(star, str(out), seed=9)
    before = contents(out)
    done: list[int] = []
    aceray.prepare(star, str(out), on_progress=lambda progress: done.append(progress.shards_done))
    assert done == [2, 3, 4] and contents(out) == whole and before.items() <= whole.items()
    assert list(store.sizes()) == ["set"]


def test_training_and_prediction_read_from_a_store(store: RemotePath, tmp_path: Path) -> None:
    write_particles(store / "blobs", truth=True)
    particles = open_particles(store / "blobs")
    truth, volume = particles.read_truth(), particles.read_truth_volume()
    assert truth is not None and volume is not None and len(truth.rotation) == 1024
    config = aceray.load_config(f"data.path={particles.path}", f"runs={tmp_path / 'runs'}", *QUICK, "train.steps=3")
    result = aceray.train(config)
    found = aceray.predict(result.folder, str(store / "blobs"), tmp_path / "out", eightfold=False)
    assert found.particles == 1024
    assert SECRET not in (result.folder / "config.yaml").read_text()


def test_an_upload_that_fails_leaves_nothing(store: RemotePath, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_bytes(b"0123456789" * 100)

    def broken(source, target, size) -> None:
        target.write(source.read(100))
        raise OSError("the line went dead")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="went dead"):
        patched.setattr(shutil, "copyfileobj", broken)
        (store / "file").upload(tmp_path / "file")
    assert not (store / "file").exists()
    (store / "file").upload(tmp_path / "file")
    assert (store / "file").stat().st_size == 1000
    with (store / "file").open_input() as stream:
        stream.seek(995)
        assert stream.read() == b"56789"


def test_a_dataset_that_was_not_finished_is_taken_away(store: RemotePath, monkeypatch) -> None:
    from aceray.data.writer import ParticleWriter

    monkeypatch.setattr(ParticleWriter, "finish", lambda *rest: (_ for _ in ()).throw(DataError("no")))
    with pytest.raises(DataError, match="no"):
        write_particles(store / "blobs")
    assert not (store / "blobs").exists()


def test_names_do_not_lead_out_of_the_folders(store: RemotePath, star: Path, tmp_path: Path) -> None:
    remote = uploaded(star.parent, store / "project" / "input")
    (store / "project" / "outside.mrcs").upload(star.parent / "stacks" / "a.mrcs")
    for name in ("../outside.mrcs", "/project/outside.mrcs", f"{store}/project/outside.mrcs"):
        (remote / "q.star").upload(write_star(tmp_path / "q.star", [f"1@{name}"]))
        errors = " ".join(aceray.check(str(remote / "q.star")).findings.errors)
        assert "outside" in errors or "not there" in errors


def test_what_a_store_refuses_is_told_in_one_line(store: RemotePath, tmp_path: Path) -> None:
    query = store.query
    nowhere = RemotePath("s3", "no-such-bucket-at-all/set", query)
    with pytest.raises(DataError, match="there is no such bucket"):
        open_particles(nowhere)
    with pytest.raises(DataError, match="there is no such folder"):
        open_particles(store / "nothing")
    with pytest.raises(DataError, match="is not there"):
        aceray.prepare(write_star(tmp_path / "p.star", ["1@a.mrcs"]), str(store / "x"), datadir=str(store / "none"))
    if query:
        with pytest.raises(DataError, match="there is no such bucket; create it") as caught:
            write_particles(nowhere)
        assert SECRET not in str(caught.value) and "\n" not in str(caught.value)


def test_an_endpoint_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(DataError, match="the endpoint cannot be reached; check its address") as caught:
        open_particles("s3://bucket/set?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1")
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "said",
    [
        "When reading information for key 'x' in bucket 'b': AWS Error ACCESS_DENIED during HeadObject operation: No "
        "response body.",
        "AWS Error INVALID_ACCESS_KEY_ID during PutObject operation: The AWS Access Key Id you provided does not exist",
        "AWS Error SIGNATURE_DOES_NOT_MATCH during ListObjectsV2 operation: The request signature we calculated",
    ],
)
def test_refused_credentials(said: str) -> None:
    text = remote_trouble("s3://b/x", OSError(said))
    assert text is not None and text.startswith("s3://b/x: the credentials are refused")
    assert "AWS_ACCESS_KEY_ID" in text


def test_no_credentials_for_google() -> None:
    said = "google::cloud::Status(UNAVAILABLE: … Could not create a OAuth2 access token to authenticate the request."
    text = remote_trouble("gs://b/x", OSError(said))
    assert text is not None and "there are no credentials" in text and "GOOGLE_APPLICATION_CREDENTIALS" in text


@pytest.mark.parametrize(
    "query, uri",
    [
        ("", "gs://b?retry_limit_seconds=60"),
        ("anonymous=true&scheme=http", "gs://anonymous@b?retry_limit_seconds=60&scheme=http"),
        ("retry_limit_seconds=5", "gs://b?retry_limit_seconds=5"),
        ("endpoint_override=h%3A1", "gs://b?retry_limit_seconds=60&endpoint_override=h%3A1"),
    ],
)
def test_google_is_not_tried_for_a_quarter_of_an_hour(query: str, uri: str) -> None:
    assert places._uri_for_google("b", query) == uri


def test_a_public_bucket_of_google() -> None:
    found = location("gs://anonymous@bucket/set?scheme=http")
    assert str(found) == "gs://bucket/set?scheme=http&anonymous=true" and location(str(found)) == found
    assert str(location("gs://anonymous@bucket/set")) == "gs://bucket/set?anonymous=true"


def test_places() -> None:
    assert location("data/set") == Path("data/set") and location("file:///a/b%20c") == Path("/a/b c")
    with pytest.raises(DataError, match=r"s3://…@bucket: credentials do not belong into a path") as caught:
        location(f"s3://me:{SECRET}@bucket/set")
    assert SECRET not in str(caught.value)
    found = location("s3://bucket/a/../b/set/?region=eu-west-1")
    assert (
        str(found) == "s3://bucket/b/set?region=eu-west-1"
        and str(found.parent / "c") == "s3://bucket/b/c?region=eu-west-1"
    )
    assert not (found / "../../../other/x").is_relative_to(found) and (found / "x").is_relative_to(found)
    assert not location("s3://bucket/b/set2").is_relative_to(location("s3://bucket/b/set"))
    with pytest.raises(DataError, match="no place that pyarrow can open"):
        open_particles("nfs4://bucket/x")
    with pytest.raises(DataError, match="no place that pyarrow can open"):
        open_particles("s3://bucket/x?region=eu-west-1&colour=blue")
