"""Which steps a training window has, for every configuration of this package."""


class WindowedConfig:
    """Adds the windows to a configuration that has `n_obs_steps`, `horizon` and `window_store`."""

    n_obs_steps: int
    horizon: int
    window_store: bool

    @property
    def observation_delta_indices(self) -> list[int] | None:
        """Steps of the observations in a window, relative to the present; None: the window store has them."""
        return None if self.window_store else self.observation_window

    @property
    def action_delta_indices(self) -> list[int] | None:
        """Steps of the actions in a window, relative to the present; None: the window store has them."""
        return None if self.window_store else self.action_window

    @property
    def observation_window(self) -> list[int]:
        """Steps of the observations, `[1 - n_obs_steps, ..., 0]`."""
        return list(range(1 - self.n_obs_steps, 1))

    @property
    def action_window(self) -> list[int]:
        """Steps of the actions, `horizon` of them from the first observation on."""
        return list(range(1 - self.n_obs_steps, 1 - self.n_obs_steps + self.horizon))
