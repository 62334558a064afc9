"""What fine-tuning does to the samples of a policy, beyond its loss."""

import torch
from torch import Tensor

from fm_policy.flow.solvers import Velocity

TWO_MEANS_STEPS = 10


def spread(samples: Tensor) -> Tensor:
    """Standard deviation of the chunks that one observation gets from different noises.

    Fine-tuning on independent pairs drives it to zero in the end: its minimiser is E[x1 | o].

    Args:
        samples: `(K, B, horizon, action_dim)`, K at least 2 noises for each of B observations.

    Returns:
        `(B,)`, the root of the variance over the noises, averaged over time and action dimensions.
    """
    return samples.var(dim=0).flatten(1).mean(dim=1).sqrt()


def mode_changes(before: Tensor, after: Tensor) -> Tensor:
    """Chunks that another map sends to another mode than the first one does, from the same noise.

    Of each observation, the chunks before are cut into two groups by 2-means, started along their first principal
    axis. A chunk has changed its mode if it ends less than half as far from the other group's centre as from its own's.
    So a shift, or a shrinkage towards the mean, is no change; where there is one mode only, hardly any chunk goes so
    far.

    Args:
        before: `(K, B, horizon, action_dim)`, chunks of K noises for each of B observations, K at least 2.
        after: The same noises' chunks by another map.

    Returns:
        Whether each chunk changed, `(K, B)` boolean.
    """
    old, new = (chunks.transpose(0, 1).flatten(2) for chunks in (before, after))  # (B, K, D)
    centred = old - old.mean(dim=1, keepdim=True)
    axis = torch.linalg.svd(centred, full_matrices=False).Vh[:, :1]  # (B, 1, D)
    group = ((centred * axis).sum(dim=2) > 0).long()  # (B, K)
    for _ in range(TWO_MEANS_STEPS):
        centres = torch.stack([_centre(old, group == 0), _centre(old, group == 1)], dim=1)  # (B, 2, D)
        group = _distances(old, centres).argmin(dim=2)
    distances = _distances(new, centres)
    own, other = (distances.gather(2, chosen.unsqueeze(2)).squeeze(2) for chosen in (group, 1 - group))
    return (other < 0.5 * own).T


def _distances(rows: Tensor, centres: Tensor) -> Tensor:
    """Of `(B, K, D)` from `(B, 2, D)`, `(B, K, 2)`."""
    return (rows.unsqueeze(2) - centres.unsqueeze(1)).norm(dim=3)


def _centre(rows: Tensor, chosen: Tensor) -> Tensor:
    """Of the chosen rows; infinitely far where none is."""
    weight = chosen.unsqueeze(2).to(rows.dtype)
    count = weight.sum(dim=1)
    return torch.where(count > 0, (rows * weight).sum(dim=1) / count, torch.inf)


class StepGradients:
    """A velocity that records how strongly the loss depends on its answers, solver step by solver step.

    Where one step's gradient is orders above the others', fine-tuning changes that part of the flow alone. A call at
    the end of a step, as Heun's rule makes it, counts for the next one.
    """

    def __init__(self, v: Velocity, num_steps: int) -> None:
        """Record v on a grid of `num_steps` steps from 0 to 1."""
        self.v = v
        self.squares = [0.0] * num_steps

    def __call__(self, t: float | Tensor, x: Tensor) -> Tensor:
        """Call v, and wait for the gradient of its answer."""
        answer = self.v(t, x)
        if answer.requires_grad:
            step = min(int(float(t) * len(self.squares) + 1e-6), len(self.squares) - 1)
            answer.register_hook(lambda gradient: self._add(step, gradient))
        return answer

    def _add(self, step: int, gradient: Tensor) -> None:
        self.squares[step] += float(gradient.detach().square().sum())

    def logs(self) -> dict[str, float]:
        """`grad_step_<n>`: norm of the gradient with respect to v's answers in step n, relative to the steps' mean.

        Empty before the backward pass.
        """
        norms = [square**0.5 for square in self.squares]
        mean = sum(norms) / len(norms)
        return {f"grad_step_{step:02d}": norm / mean for step, norm in enumerate(norms)} if mean else {}
