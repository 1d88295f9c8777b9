import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from aceray.config import Config
from aceray.data.mrc import write_volume
from aceray.errors import ConfigError, DataError
from aceray.folder import RunFolder, RunResult, create_run_folder, open_run_folder, write_json
from aceray.presets import load_config


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {
        "model.weight": torch.arange(12.0).reshape(3, 4) + step,
        "model.count": torch.tensor(step),
        "model.half": torch.ones(5, dtype=torch.bfloat16),
        "optimiser.0.exp_avg": torch.zeros(0),
    }


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return create_run_folder(config(tmp_path))


def config(tmp_path: Path, *overrides: str) -> Config:
    return load_config(f"runs={tmp_path / 'runs'}", "name=one", *overrides)


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_checkpoint_comes_back_whole(folder: RunFolder) -> None:
    folder.write_checkpoint(tensors(7), {"step": 7}, keep=2)
    found, metadata = folder.read_checkpoint(7)
    assert metadata == {"step": 7}
    assert found.keys() == tensors(7).keys()
    for name, tensor in tensors(7).items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_newest_checkpoints_are_kept(folder: RunFolder) -> None:
    for step in (9, 10, 100):
        folder.write_checkpoint(tensors(step), {"step": step}, keep=2)
    assert folder.checkpoint_steps() == [10, 100]
    assert sorted(file.name for file in folder.checkpoints.iterdir()) == [
        "step-000010.safetensors",
        "step-000100.safetensors",
    ]


def test_a_failed_write_leaves_the_old_checkpoint(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_checkpoint(tensors(7), {"step": 7}, keep=1)
    before = content(folder.path)

    def full(path: Path, data: bytes) -> int:
        with open(path, "wb") as stream:
            stream.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match=r"step-000008\.safetensors.*No space left"):
        folder.write_checkpoint(tensors(8), {"step": 8}, keep=1)
    assert content(folder.path) == before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "header", "empty", "foreign"])
def test_damaged_checkpoint_is_named(folder: RunFolder, damage: str) -> None:
    folder.write_checkpoint(tensors(10), {"step": 10}, keep=2)
    file = folder.write_checkpoint(tensors(20), {"step": 20}, keep=2)
    whole = bytearray(file.read_bytes())
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    match damage:
        case "truncated":
            whole = whole[:-3]
        case "flipped":
            whole[start + 1] ^= 1
        case "header":
            whole[9] = 0
        case "empty":
            whole = bytearray()
        case "foreign":
            from safetensors.torch import save

            whole = bytearray(save({"a": torch.ones(2)}))
    file.write_bytes(whole)
    with pytest.raises(DataError) as error:
        folder.read_checkpoint(20)
    assert str(file) in str(error.value)
    assert "delete it and resume, which starts again from step 10" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_changed_step_is_a_damaged_checkpoint(folder: RunFolder) -> None:
    file = folder.write_checkpoint(tensors(20), {"step": 20}, keep=2)
    whole = file.read_bytes()
    assert whole.count(b'{\\"step\\": 20}') == 1
    file.write_bytes(whole.replace(b'{\\"step\\": 20}', b'{\\"step\\": 21}'))
    with pytest.raises(DataError, match="digest"):
        folder.read_checkpoint(20)


def test_missing_checkpoint(folder: RunFolder) -> None:
    with pytest.raises(DataError, match="no such checkpoint"):
        folder.read_checkpoint(5)


def test_config_is_a_preset(folder: RunFolder, tmp_path: Path) -> None:
    assert load_config(str(folder.config)) == config(tmp_path)


def test_existing_run_is_described_and_untouched(folder: RunFolder, tmp_path: Path) -> None:
    folder.write_checkpoint(tensors(30), {"step": 30}, keep=2)
    before = content(folder.path)
    with pytest.raises(DataError) as error:
        create_run_folder(config(tmp_path))
    for part in (str(folder.path), "step 30", "resume", "overwrite"):
        assert part in str(error.value)
    assert content(folder.path) == before


@pytest.mark.parametrize("existing", ["error", "resume", "overwrite"])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path: Path, existing: str) -> None:
    path = tmp_path / "runs" / "one"
    path.mkdir(parents=True)
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="nothing was touched"):
        create_run_folder(config(tmp_path), existing)  # type: ignore[arg-type]
    assert content(path) == {"thesis.tex": b"years of work"}


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one").write_text("a file")
    with pytest.raises(DataError, match="is a file"):
        create_run_folder(config(tmp_path), "overwrite")


def test_runs_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(DataError, match="runs"):
        create_run_folder(config(tmp_path))


def test_overwrite_starts_empty(folder: RunFolder, tmp_path: Path) -> None:
    folder.write_checkpoint(tensors(30), {"step": 30}, keep=2)
    folder.write_notes(mlflow_run_id="abc")
    fresh = create_run_folder(config(tmp_path, "seed=9"), "overwrite")
    assert fresh.checkpoint_steps() == []
    assert fresh.read_notes() == {}
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one"]


def test_resume_keeps_everything_and_removes_what_a_kill_left(folder: RunFolder, tmp_path: Path) -> None:
    folder.write_checkpoint(tensors(30), {"step": 30}, keep=2)
    left = folder.checkpoints / ".step-000040.safetensors.0123456789ab.partial"
    left.write_bytes(b"half")
    folder.scratch.mkdir()
    resumed = create_run_folder(config(tmp_path), "resume")
    assert resumed.checkpoint_steps() == [30]
    assert not left.exists()
    assert not folder.scratch.exists()


def test_resume_without_a_run_begins_one(tmp_path: Path) -> None:
    assert create_run_folder(config(tmp_path), "resume").config.exists()


@pytest.mark.parametrize(
    "key, override",
    [
        ("optim.decoder_lr", "optim.decoder_lr=0.5"),
        ("train.steps", "train.steps=7"),
        ("encoder.kind", "encoder.kind=resnet18"),
        ("train.lanes", "resources.workers=2"),
        ("data.half_set", "data.half_set=1"),
        ("data.heldout_fraction", "data.heldout_fraction=0.05"),
    ],
)
def test_resume_refuses_another_result(folder: RunFolder, tmp_path: Path, key: str, override: str) -> None:
    before = content(folder.path)
    with pytest.raises(ConfigError, match=rf"^{key}: "):
        create_run_folder(config(tmp_path, override), "resume")
    assert content(folder.path) == before


def test_resume_accepts_another_place(folder: RunFolder, tmp_path: Path) -> None:
    free = config(
        tmp_path, "resources.workers=1", "data.path=/elsewhere", "tracking.enabled=false", "train.checkpoint_every=3"
    )
    assert load_config(str(create_run_folder(free, "resume").config)) == free


def test_open_wants_a_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.yaml"):
        open_run_folder(tmp_path)


def test_history_is_cut_at_a_step_and_survives_half_a_line(folder: RunFolder) -> None:
    folder.history.write_text(
        "".join(json.dumps({"step": step, "a": step / 2}) + "\n" for step in range(1, 6)) + '{"st'
    )
    assert [row["step"] for row in folder.read_history()] == [1, 2, 3, 4, 5]
    assert folder.cut_history(3) == [{"step": step, "a": step / 2} for step in (1, 2, 3)]
    assert folder.read_history() == [{"step": step, "a": step / 2} for step in (1, 2, 3)]


def test_json_has_no_words_that_json_lacks(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"good": 1.5, "bad": float("nan"), "worse": float("inf"), "count": 3})
    assert json.loads((tmp_path / "a.json").read_text()) == {"good": 1.5, "bad": None, "worse": None, "count": 3}


def test_result_reads_volume_and_poses_when_asked(folder: RunFolder) -> None:
    import pandas

    volume = torch.arange(64.0).reshape(4, 4, 4)
    write_volume(folder.volume, volume, 2.0)
    pandas.DataFrame({"particle_id": [0, 1]}).to_parquet(folder.poses)
    result = RunResult({}, folder.path, folder.paths, None)
    np.testing.assert_array_equal(result.volume, volume.numpy())
    assert result.poses["particle_id"].tolist() == [0, 1]
    assert "metrics" not in result.paths
