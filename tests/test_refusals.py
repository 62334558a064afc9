"""What LeRobot's programs say of a setting that is refused: which one, and what was expected."""

import draccus
import pytest
from lerobot.configs.train import TrainPipelineConfig

import lerobot_policy_fm_ft  # noqa: F401, the door that LeRobot's programs open
from fm_policy import recipes

RECIPES = recipes.available("fm_ft") | recipes.available("dp_ema")


def told(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == "lerobot_policy_fm_ft.refusals"]


@pytest.mark.parametrize(
    ("key", "flag", "reason"),
    [
        (("pusht", "state", "unet"), "--policy.noise_scale=inf", "noise_scale must be finite and 0 or more, got inf"),
        (("pusht", "state", "unet"), "--env.episode_length=0", "episode_length must be positive, not 0"),
        (
            ("pusht", "state", "diffusion"),
            "--policy.noise_scale=-1",
            "noise_scale must be finite and 0 or more, got -1.0",
        ),
        (("kitchen", "state", "unet"), "--env.layout=x", "layout must be relay or d4rl, not 'x'"),
        (("lift", "state", "unet"), "--env.actions=x", "actions must be one of absolute, delta, not 'x'"),
    ],
)
def test_a_refused_flag_is_told_with_its_reason(key, flag, reason, caplog):
    recipe = RECIPES[recipes.RecipeKey(*key)]
    with pytest.raises(draccus.utils.DecodingError, match="Couldn't instantiate class") as refusal:
        draccus.parse(TrainPipelineConfig, config_path=recipe, args=[flag])
    assert reason not in str(refusal.value)  # otherwise there is nothing left to tell
    assert [message.partition(": ")[2] for message in told(caplog)] == [reason]


def test_what_is_accepted_is_not_told(caplog):
    draccus.parse(TrainPipelineConfig, config_path=RECIPES[recipes.RecipeKey("pusht", "state", "unet")], args=[])
    assert not told(caplog)
