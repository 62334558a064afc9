"""The model card that lies beside every checkpoint."""

import re
from pathlib import Path

from fm_policy.configuration_fm_ft import FlowMatchingConfig

TEMPLATE = """---
library_name: lerobot
pipeline_tag: robotics
license: {license}
tags: [lerobot, robotics, flow-matching, fm_ft]
---

# Flow-matching policy (`fm_ft`, stage `{stage}`)

{about}

| | |
|---|---|
| observes | {observes} (history of {n_obs_steps}) |
| predicts | {predicts}, a chunk of {horizon}, {n_action_steps} executed |
| velocity net | {velocity_net} |
| solver | {solver}, {calls} per chunk{noise} |
{head}| coupling | {coupling} |
| moving average of weights | {average} |

```python
import lerobot_policy_fm_ft  # registers the type
from fm_policy.modeling_fm_ft import FlowMatchingPolicy
from lerobot.policies.factory import make_pre_post_processors

path = "path/to/this/folder"
policy = FlowMatchingPolicy.from_pretrained(path)
here = {{"device_processor": {{"device": policy.config.device}}}}  # wherever it was trained
preprocessor, postprocessor = make_pre_post_processors(policy.config, path, preprocessor_overrides=here)
```

Made with `lerobot_policy_fm_ft` for LeRobot. No evaluation is implied by this card.
"""


def write(config: FlowMatchingConfig, folder: Path, about: str | None = None, average: str | None = None) -> None:
    """Write `README.md` of a checkpoint into its folder; see `render`."""
    (folder / "README.md").write_text(render(config, about, average))


def words_of(folder: Path) -> str:
    """What the card in a checkpoint's folder says above its table; nothing where there is no such card."""
    card = folder / "README.md"
    text = card.read_text() if card.is_file() else ""
    said = re.search(r"^# Flow-matching policy[^\n]*\n(.*?)^\| \| \|$", text, re.DOTALL | re.MULTILINE)
    return said[1].strip() if said else ""


def render(config: FlowMatchingConfig, about: str | None = None, average: str | None = None) -> str:
    """The card's text.

    Args:
        config: The policy's.
        about: What is said above the table; if it is not given, which data LeRobot's trainer trains on.
        average: What is said of the weights' moving average; if it is not given, whether there is one.
    """
    meta = getattr(config, "_runtime_dataset_meta", None)
    data = f"Trained on `{meta.repo_id}`: {meta.total_episodes} episodes, {meta.total_frames} frames." if meta else ""
    return TEMPLATE.format(
        license=config.license or "apache-2.0",
        stage=config.stage,
        about=data if about is None else about,
        observes=_features(config.input_features),
        predicts=_features(config.output_features),
        n_obs_steps=config.n_obs_steps,
        horizon=config.horizon,
        n_action_steps=config.n_action_steps,
        velocity_net=config.velocity_net,
        solver=config.solver,
        calls="1 network call" if config.nfe == 1 else f"{config.nfe or 'adaptively many'} network calls",
        noise="" if config.noise_scale == 1 else f", noise scaled by {config.noise_scale:g}",
        head=_head_row(config),
        coupling=config.coupling,
        average=average or ("yes" if config.use_ema else "no"),
    )


def _head_row(config: FlowMatchingConfig) -> str:
    if config.head is None:
        return ""
    kind = f" ({config.head_mode}, {config.head_layout})" if config.head == "control_synth" else ""
    return f"| head | {config.head}{kind}, {config.head_steps} Euler steps from t = 1 to {1 + config.head_span:g} |\n"


def _features(features: dict | None) -> str:
    return ", ".join(f"`{name}` {tuple(feature.shape)}" for name, feature in (features or {}).items())
