"""What choosing among noises by fewer solver steps gives away, for a real policy on demonstrations."""

import torch

from fm_policy.assets import default_demos, pretrained_policy
from fm_policy.evaluation.checkpoint import load_checkpoint
from fm_policy.evaluation.held_out_windows import HeldOutWindows
from fm_policy.flow.losses import masked_mse


def test_a_quarter_of_the_steps_chooses_nearly_the_best_of_five_noises():
    checkpoint = load_checkpoint(pretrained_policy())
    policy = checkpoint.policy
    windows = HeldOutWindows.of_dataset(default_demos(), policy.config, samples=64, draws=5, seed=0)
    (batch,) = windows.batches()
    batch = checkpoint.preprocessor(batch)
    errors = {}
    for steps in (16, 4):
        policy.config.num_solver_steps = steps
        with torch.no_grad():
            chunks = [policy.reconstruct(batch, noise) for noise in windows.noise]
        masks = batch["action"], batch["action_is_pad"]
        errors[steps] = torch.stack([masked_mse(chunk, *masks, "none") for chunk in chunks])
    exact, rows = errors[16], torch.arange(64)
    best, chosen = (exact[errors[steps].argmin(dim=0), rows].mean() for steps in (16, 4))
    assert exact.mean() > 1.5 * best  # it matters which noise is taken
    assert chosen - best < 0.1 * (exact.mean() - best)
