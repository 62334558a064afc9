"""Several processes that share an evaluation; here they are threads, so that nothing is imported twice."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
import torch

from fm_policy.evaluation import ranks
from fm_policy.evaluation.checkpoint import load_checkpoint
from fm_policy.evaluation.episodes import EpisodeKey, join_parts, read_episodes
from fm_policy.evaluation.ranks import ALONE, Rank, companions, join
from fm_policy.evaluation.runs import Run, evaluate_into

RUN = Run(seed=1000, episodes=5, repeats=2, batch_size=2)


@pytest.fixture(scope="module")
def alone(checkpoint, short_pusht, tmp_path_factory):
    """Folder and summary of what one process writes."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, evaluate_into(folder, checkpoint, short_pusht, RUN)


def rows(folder):
    return sorted(read_episodes(folder / "episodes.jsonl"), key=lambda episode: episode.key)


@pytest.fixture
def together(checkpoint, short_pusht):
    """Evaluates into a folder by some ranks at once, each with a policy of its own."""

    def run(folder, count, **options):
        meeting = Barrier(count)

        class Thread(Rank):
            def wait(self):
                meeting.wait(60)

        def one(number):
            own = load_checkpoint(checkpoint.path)
            return evaluate_into(folder, own, short_pusht, RUN, rank=Thread(number, count), **options)

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(one, range(count)))

    return run


def test_shares_are_the_plan_and_even():
    shares = [Rank(number, 3).share(RUN.jobs) for number in range(3)]
    assert sorted(key for share in shares for key in share) == sorted(RUN.jobs)
    assert sorted(map(len, shares)) == [3, 3, 4]
    assert ALONE.share(RUN.jobs) == RUN.jobs


def test_several_write_what_one_writes(together, alone, tmp_path):
    folder, expected = alone
    summaries = together(tmp_path, 3)
    assert rows(tmp_path) == rows(folder)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "episodes.jsonl", "summary.json"}
    assert summaries[0] == summaries[1] == summaries[2]
    apart = {"ms_per_chunk", "processes", "seconds"}
    assert {name for name in expected if expected[name] != summaries[0][name]} == apart
    assert (summaries[0]["processes"], summaries[0]["episodes_run_now"]) == (3, 10)


def test_what_several_left_is_continued_by_fewer(together, alone, checkpoint, short_pusht, tmp_path):
    """As a kill leaves it: rows in three files, one of them in two files, one cut off."""
    folder, _ = alone
    lines = (folder / "episodes.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run.json").write_text((folder / "run.json").read_text())
    (tmp_path / "episodes.jsonl").write_text("".join(lines[:2]))
    (tmp_path / "episodes.1.jsonl").write_text("".join(lines[1:4]) + lines[8][:30])
    (tmp_path / "episodes.2.jsonl").write_text(lines[5])
    summaries = together(tmp_path, 2, resume=True)
    assert rows(tmp_path) == rows(folder)
    assert not list(tmp_path.glob("episodes.*.jsonl"))
    assert summaries[0]["episodes_run_now"] == 5
    again = evaluate_into(tmp_path, checkpoint, short_pusht, RUN, resume=True)
    assert (again["episodes_run_now"], again["score"]) == (0, summaries[0]["score"])


def test_another_evaluation_is_not_continued_and_nothing_is_lost(together, alone, checkpoint, short_pusht, tmp_path):
    together(tmp_path, 2)
    with pytest.raises(ValueError, match="holds another evaluation:\\n  seed: 1000 there, 7 now"):
        evaluate_into(tmp_path, checkpoint, short_pusht, replace(RUN, seed=7), resume=True)
    assert [episode.key for episode in join_parts(tmp_path / "episodes.jsonl")].count(EpisodeKey(1000, 0)) == 1


LATE = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
from fm_policy.evaluation import ranks
ranks.MEETING = timedelta(seconds=5)
late, folder = int(sys.argv[1]), Path(sys.argv[2])
(folder / os.environ["RANK"]).touch()
while len(list(folder.iterdir())) < 2:  # imports may take one longer than the other
    time.sleep(0.01)
rank = ranks.join()
time.sleep(10 * (rank.number == late))
rank.wait()
print("together")
"""


@pytest.mark.parametrize("late", [0, 1])
def test_processes_wait_longer_for_one_another_than_for_the_start(late, tmp_path):
    """In processes of their own: it is torch's waiting that is in question."""
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks._free_port())}
    command = [sys.executable, "-c", LATE, str(late), str(tmp_path)]
    started = [
        subprocess.Popen(command, env=os.environ | meeting | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [process.communicate(timeout=120)[0] for process in started] == ["together\n"] * 2


def test_a_process_that_was_started_alone_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join() == ALONE and ALONE.first
    ALONE.wait()


def test_companions_are_started_once_and_ended_when_this_process_fails(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("sys.argv", ["-c", "import time; time.sleep(100)"])
    started = []
    monkeypatch.setattr(ranks, "_start", lambda *of, start=ranks._start: started.append(start(*of)) or started[-1])
    before = dict(os.environ)

    def fail():
        with companions(3):
            assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "3")
            with companions(3):
                assert [companion.poll() for companion in started] == [None, None]
            raise KeyError("failed")

    with pytest.raises(KeyError, match="failed"):
        fail()
    assert all(companion.poll() is not None for companion in started)
    assert dict(os.environ) == before


def test_a_companion_that_fails_is_told(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("sys.argv", ["-c", "import os; raise SystemExit(os.environ['RANK'] == '2')"])
    with pytest.raises(ConnectionError, match=r"of 3 processes these failed: \[2\]"), companions(3):
        pass


@pytest.mark.parametrize(("said", "threads"), [(None, "1"), ("3", "3")])
def test_companions_share_the_cores_unless_the_user_says_otherwise(monkeypatch, said, threads):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(ranks, "cores", lambda: 3)
    before = torch.get_num_threads()
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        torch.set_num_threads(int(said))  # as torch does when it starts
    monkeypatch.setattr(
        "sys.argv", ["-c", f"import os; raise SystemExit(os.environ['OMP_NUM_THREADS'] != '{threads}')"]
    )
    with companions(2):
        assert torch.get_num_threads() == int(threads)
    torch.set_num_threads(before)


def test_there_is_at_least_one_process():
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"), companions(0):
        pass
