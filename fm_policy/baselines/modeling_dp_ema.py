"""LeRobot's diffusion policy with averaged weights, and with noise that can be handed in whole."""

from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from lerobot.policies.diffusion.modeling_diffusion import DiffusionModel, DiffusionPolicy
from torch import Tensor, nn

from fm_policy import contract, normalization, window_store
from fm_policy.baselines.configuration_dp_ema import STOCHASTIC, DiffusionEmaConfig
from fm_policy.ema import ema_decay, ema_update
from fm_policy.flow.noise import disturbed
from fm_policy.repeatable import of_step


class RepeatableDiffusion(DiffusionModel):
    """LeRobot's model, whose reverse process takes all its noise as one tensor."""

    def conditional_sample(
        self,
        batch_size: int,
        global_cond: Tensor,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Carry noise to chunks, as LeRobot does.

        Diffusers' DDPM draws the noise of its steps itself, for a batch as a whole. DDIM with eta = 1 and re-derived
        noise is the same process (Song et al. 2021, eq. 16) and can be handed it.

        Args:
            batch_size: Number of chunks, B.
            global_cond: Features of the observations, `(B, obs_dim)`.
            generator: Source of the noise, if it is not given.
            noise: Standard normal, `(B, *config.noise_shape)`, which `noise_scale` is multiplied with: the start and,
                for DDPM, what each step but the last one adds.

        Returns:
            Normalised chunks, `(B, horizon, action_dim)`.
        """
        config: DiffusionEmaConfig = self.config
        shape = (batch_size, *config.noise_shape)
        if noise is None:
            noise = torch.randn(shape, generator=generator, device=global_cond.device, dtype=global_cond.dtype)
        contract.check_noise(noise, shape)
        x, *added = (config.noise_scale * noise.to(global_cond)).view(batch_size, -1, *shape[-2:]).unbind(dim=1)
        stochastic = config.solver == STOCHASTIC
        scheduler = DDIMScheduler.from_config(self.noise_scheduler.config)
        scheduler.set_timesteps(config.num_solver_steps)
        for t, z in zip(scheduler.timesteps, chain(added, repeat(torch.zeros_like(x))), strict=False):
            prediction = self.unet(x, t.to(x.device).expand(batch_size), global_cond=global_cond)
            step = {"eta": float(stochastic), "use_clipped_model_output": stochastic, "variance_noise": z}
            x = scheduler.step(prediction, t, x, **step).prev_sample
        return x


class DiffusionEmaPolicy(DiffusionPolicy):
    """LeRobot's diffusion policy with a moving average of its weights.

    Args:
        config: The configuration, with its input and output features.
        dataset_meta: The data set to train on, handed in by LeRobot's trainer; opens the window store.
        **kwargs: What else LeRobot hands in, unused.
    """

    config_class = DiffusionEmaConfig
    name = "dp_ema"

    def __init__(self, config: DiffusionEmaConfig, dataset_meta: Any = None, **kwargs: Any) -> None:
        super().__init__(config)
        live, average = RepeatableDiffusion(config), RepeatableDiffusion(config)
        average.load_state_dict(live.state_dict())
        self.diffusion, self.ema_diffusion = live, average.requires_grad_(False)
        self.register_buffer("ema_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("training_steps", torch.zeros((), dtype=torch.int64))  # see `of_step`
        self.nfe = config.nfe
        if dataset_meta is not None:
            if config.window_store:
                window_store.attach(window_store.of_policy(dataset_meta, config, config.input_features or {}))
            normalization.prepare(config, dataset_meta)

    def __getattr__(self, name: str) -> Any:
        """The net that LeRobot's methods know as `diffusion`: in evaluation mode the average."""
        averaged = name == "diffusion" and not self.training and "ema_diffusion" in self._modules
        return super().__getattr__("ema_diffusion" if averaged else name)

    def get_optim_params(self) -> list[nn.Parameter]:
        """The parameters to train, without their average."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, None]:
        """LeRobot's loss; what it draws depends on `--seed` and step alone, so that a resumed training repeats it."""
        with of_step(self.training, self.training_steps):
            if self.training:
                numbers = [name for name in self.config.input_features if name not in self.config.image_features]
                batch = disturbed(batch, numbers, self.config.observation_noise)
            return super().forward(batch)

    def update(self) -> None:
        """Move the average of the weights; LeRobot's trainer calls this after every optimiser step."""
        self.ema_updates += 1
        decay = ema_decay(int(self.ema_updates), self.config.ema_power, self.config.ema_max_decay)
        ema_update(self.ema_diffusion, self._modules["diffusion"], decay)

    @classmethod
    def _load_as_safetensor(
        cls, model: "DiffusionEmaPolicy", model_file: str, map_location: str, strict: bool
    ) -> "DiffusionEmaPolicy":
        """Load weights, all of them whatever `strict` says; to go on training, only on data normalised as they were.

        Raises:
            ValueError: As `keep_statistics`.
            RuntimeError: If the file lacks a weight, as of the average, or has one too many.
        """
        normalization.keep_statistics(model.config, Path(model_file).parent)
        return super()._load_as_safetensor(model, model_file, map_location, strict=True)

    def ema_only(self) -> "DiffusionEmaPolicy":
        """A copy whose weights are the averaged ones, and whose average begins anew with them."""
        policy = DiffusionEmaPolicy(self.config)
        for net in (policy._modules["diffusion"], policy.ema_diffusion):
            net.load_state_dict(self.ema_diffusion.state_dict())
        policy.training_steps.copy_(self.training_steps)
        return policy.eval()
