"""The recorder of scripted experts: which attempts it keeps, what it writes, how it goes on after a kill."""

import json
from pathlib import Path

import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from env_configs.demos import scripted
from env_configs.demos.__main__ import main
from env_configs.demos.scripted import Recording, record, recording_of

FEATURES = {
    "observation.state": {"dtype": "float32", "shape": (1,), "names": None},
    "action": {"dtype": "float32", "shape": (1,), "names": None},
}
EXPERT = '''
import time
from pathlib import Path
import numpy as np
from env_configs.experts.attempt import Attempt

def attempt(seed, options):
    """Odd seeds succeed; the action is the seed. Which seeds were tried is noted."""
    (Path(options["notes"]) / str(seed)).touch()
    if options.get("dies_at") == str(seed):
        raise RuntimeError("struck down")
    time.sleep(0.05 if seed % 3 == 0 else 0)
    column = np.full((seed + 1, 1), seed, dtype=np.float32)
    success = seed % 2 == 1 and options["succeeds"] == "yes"
    return Attempt({"observation.state": column, "action": column}, "count", success, {"half": float(seed > 3)})
'''


@pytest.fixture
def counting(tmp_path, monkeypatch):
    """Makes a recording by an expert that counts."""
    (tmp_path / "counting_expert.py").write_text(EXPERT)
    monkeypatch.syspath_prepend(str(tmp_path))  # spawned processes are given it too
    notes = tmp_path / "notes"
    notes.mkdir()

    def make(**options: str) -> Recording:
        given = {"notes": str(notes), "succeeds": "yes", **options}
        return Recording("kitchen", "counting_expert", given, 10, FEATURES)

    return make


def recorded_seeds(root: Path) -> list[int]:
    data = LeRobotDataset(f"local/{root.name}", root=root)
    return [int(frame["action"]) for frame in data.hf_dataset if frame["frame_index"] == 0]


def test_keeps_the_first_successes_in_the_order_of_the_seeds(counting, tmp_path):
    root = tmp_path / "demos"
    assert record(counting(), root, episodes=3, seed=2, workers=2) == (3, 4 + 6 + 8)
    assert recorded_seeds(root) == [3, 5, 7]
    about = json.loads((root / "meta" / "scripted.json").read_text())
    assert about["seeds"] == [3, 5, 7]
    assert about["attempts"] == 6  # 2 to 7; those that were under way behind them do not count
    assert about["progress"] == {"half": pytest.approx(4 / 6)}
    assert set(about["versions"]) == {"lerobot_policy_fm_ft", "gymnasium-robotics", "mujoco"}
    assert not (tmp_path / ".demos.attempts").exists()


def test_goes_on_where_it_was_cut_off(counting, tmp_path, monkeypatch):
    root, notes = tmp_path / "demos", tmp_path / "notes"
    written = scripted.write_dataset
    monkeypatch.setattr(scripted, "write_dataset", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        record(counting(), root, episodes=2, seed=0, workers=1)
    assert not root.exists()
    before = {note.name for note in notes.iterdir()}
    assert {"0", "1", "2", "3"} <= before
    for note in notes.iterdir():
        note.unlink()
    monkeypatch.setattr(scripted, "write_dataset", written)
    record(counting(), root, episodes=3, seed=0, workers=1)
    assert recorded_seeds(root) == [1, 3, 5]
    assert not before & {note.name for note in notes.iterdir()}


def test_refuses_to_mix_settings(counting, tmp_path):
    root = tmp_path / "demos"
    with pytest.raises(RuntimeError, match="struck down"):
        record(counting(dies_at="3"), root, episodes=3, seed=0, workers=1)
    with pytest.raises(ValueError, match=r"holds attempts of .*dies_at"):
        record(counting(), root, episodes=3, seed=0, workers=1)


def test_a_broken_expert_is_named(counting, tmp_path, monkeypatch):
    monkeypatch.setattr(scripted, "PATIENCE", 5)
    with pytest.raises(ValueError, match=r"5 attempts from seed 0 on have no success; reached: half 0.20"):
        record(counting(succeeds="no"), tmp_path / "demos", episodes=1, seed=0, workers=1)
    assert not (tmp_path / "demos").exists()


@pytest.mark.parametrize(("name", "value"), [("episodes", 0), ("seed", -1), ("workers", 0)])
def test_refuses_numbers_that_mean_nothing(name, value, counting, tmp_path):
    numbers = {"episodes": 1, "seed": 0, "workers": 1, name: value}
    with pytest.raises(ValueError, match=f"{name} must be .* or more, not {value}"):
        record(counting(), tmp_path / "demos", **numbers)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["kitchen", "--source", "x", "--episodes", "3"], "--episodes belongs to --scripted"),
        (["handover", "--scripted", "--mask", "train"], "--mask belongs to --source"),
        (["lift", "--scripted"], "--source"),
        (["kitchen", "--scripted", "--source", "x"], "not allowed with"),
    ],
)
def test_the_command_line_refuses_what_does_not_belong_together(flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*flags, "--root", str(tmp_path / "demos")])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("task", ["handover", "transport"])
def test_a_recording_has_the_columns_of_the_human_demonstrations(task):
    recording = recording_of(task, {"actions": "absolute"})
    assert recording.fps == 20
    assert recording.features["action"]["shape"] == (20,)
    assert np.dtype(recording.features["observation.state"]["dtype"]) == np.float32
