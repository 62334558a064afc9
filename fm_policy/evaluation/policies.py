"""The policies that an evaluation runs, and what it asks of them.

A policy makes chunks from histories and noise, `predict_action_chunk(batch, noise)`, and then says in `nfe` how often
it called its network. Its configuration names, beside LeRobot's features and `n_obs_steps`, `n_action_steps`:

    noise_shape              of all random numbers of a chunk: given them, nothing is left to chance
    chunk_length             actions from the present on that a chunk holds
    noise_scale              standard deviation that the policy gives them
    solver, num_solver_steps how noise becomes a chunk; `set_solver` chooses another way
    nfe, head_nfe            calls per chunk of the network (None: chosen by the solver) and of a head behind it
    trained_through_solver   whether the policy belongs to this solver and these steps
"""

from fm_policy.baselines.modeling_dp_ema import DiffusionEmaPolicy
from fm_policy.modeling_fm_ft import FlowMatchingPolicy

type ChunkPolicy = FlowMatchingPolicy | DiffusionEmaPolicy

POLICIES: dict[str, type[FlowMatchingPolicy] | type[DiffusionEmaPolicy]] = {
    policy.name: policy for policy in (FlowMatchingPolicy, DiffusionEmaPolicy)
}
"""By the type that a checkpoint's config.json names."""
