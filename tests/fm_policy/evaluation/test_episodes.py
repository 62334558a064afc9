import pytest

from fm_policy.evaluation.episodes import Episode, EpisodeFile, EpisodeKey, plan, read_episodes


def episode(seed: int, repeat: int = 0) -> Episode:
    measures = {"coverage": 0.1 + 0.2, "final_coverage": 1 / 3}
    return Episode(seed, repeat, [1.5, 2.0], 0.1, -0.25, measures, success=False, steps=30, nfe=16, chunks=4)


def test_plan_passes_over_all_seeds_before_it_repeats_one():
    assert plan([5, 3], 2) == [EpisodeKey(5, 0), EpisodeKey(3, 0), EpisodeKey(5, 1), EpisodeKey(3, 1)]


@pytest.mark.parametrize(("seeds", "repeats"), [([], 1), ([1, 1], 1), ([-1], 1), ([1], 0)])
def test_plan_refuses_nonsense(seeds, repeats):
    with pytest.raises(ValueError, match="seeds must be|repeats must be"):
        plan(seeds, repeats)


def test_row_names_measures_beside_the_other_fields_and_comes_back_exactly():
    row = episode(1000).to_row()
    assert list(row) == [
        *("seed", "repeat", "initial_state", "max_reward", "final_reward"),
        *("coverage", "final_coverage", "success", "steps", "nfe", "chunks"),
    ]
    assert Episode.from_row(row) == episode(1000)


def test_rows_are_on_disk_as_soon_as_they_are_added(tmp_path):
    with EpisodeFile(tmp_path / "episodes.jsonl") as file:
        for seed in range(3):
            file.append(episode(seed))
            assert read_episodes(file.path) == [episode(n) for n in range(seed + 1)]


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_row_that_a_kill_cut_off_is_dropped_and_the_file_goes_on(tmp_path, cut):
    path = tmp_path / "episodes.jsonl"
    with EpisodeFile(path) as file:
        file.append(episode(0))
        file.append(episode(1))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:cut])  # cut = -1: only the newline is missing
    with EpisodeFile(path) as file:
        assert file.episodes == [episode(0)]
        file.append(episode(1))
    assert path.read_bytes() == b"".join(lines)


def test_a_damaged_row_amid_the_file_is_named(tmp_path):
    path = tmp_path / "episodes.jsonl"
    path.write_text('{"seed": 1}\n{"seed"\n')
    with pytest.raises(ValueError, match=r"episodes\.jsonl, line 1 is no row"):
        EpisodeFile(path)


def test_an_episode_twice_in_a_file_is_refused(tmp_path):
    path = tmp_path / "episodes.jsonl"
    with EpisodeFile(path) as file:
        file.append(episode(4))
        file.append(episode(4))
    with pytest.raises(ValueError, match="holds episodes twice"):
        EpisodeFile(path)
