"""What is measured along a flow, on fields whose Lipschitz constant, curvature and straightness are known."""

import math

import pytest
import torch

from fm_policy.flow.error_bound import recursion_bound, uniform_grid_bound
from fm_policy.flow.field import Jacobian, profile, spectrum, straightness
from fm_policy.flow.solvers import integrate
from fm_policy.velocity import Transformer, Unet1d

B, D, OMEGA = 5, 6, 3.0


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, DRIVE = normal(B, D, D), normal(B, D, seed=1)
X = normal(B, D, seed=2)


def linear(t, x):
    """x' = A x + b sin(ωt), another A and b for each row."""
    return (A @ x.unsqueeze(2)).squeeze(2) + DRIVE * torch.sin(OMEGA * torch.as_tensor(t))


def rotation(t, x):
    """In the plane, by the angle ω in a unit of time."""
    return OMEGA * torch.stack([-x[:, 1], x[:, 0]], dim=1)


def sigma_max(matrix):
    return torch.linalg.matrix_norm(matrix, ord=2)


def relative(x, expected):
    return ((x - expected).norm() / expected.norm()).item()


def unet():
    torch.manual_seed(0)
    return Unet1d(2, 3, (8, 16), kernel_size=3, n_groups=4, time_embed_dim=8).double()


def transformer():
    """Moved away from its first weights, of which the last are zero."""
    torch.manual_seed(0)
    net = Transformer(2, 3, horizon=8, dim=16, layers=2, heads=2, dropout=0.1).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return net


@pytest.fixture(params=[unet, transformer], ids=["unet", "transformer"])
def learned(request):
    """The field of a net on chunks (8, 2), and a point of it."""
    return request.param().bind(normal(B, 3)), normal(B, 8, 2, seed=1)


class TestJacobian:
    def test_of_a_linear_field_is_its_matrix(self):
        jacobian = Jacobian(linear, 0.3, X)
        torch.testing.assert_close(jacobian.value, linear(0.3, X))
        torch.testing.assert_close(jacobian.matrix(), A)
        torch.testing.assert_close(jacobian.times(X), (A @ X.unsqueeze(2)).squeeze(2))
        torch.testing.assert_close(jacobian.transposed_times(X), (A.mT @ X.unsqueeze(2)).squeeze(2))

    def test_acceleration_of_a_linear_field(self):
        """A v + b ω cos(ωt)."""
        expected = (A @ linear(0.3, X).unsqueeze(2)).squeeze(2) + DRIVE * OMEGA * math.cos(OMEGA * 0.3)
        torch.testing.assert_close(Jacobian(linear, 0.3, X).acceleration(), expected)

    def test_products_with_a_learned_fields_jacobian_are_its_differences(self, learned):
        v, x = learned
        w, h = normal(*x.shape, seed=3), 1e-7
        jacobian = Jacobian(v, 0.4, x)
        with torch.no_grad():
            difference = (v(0.4 + 2 * h, x + h * w) - v(0.4 - 2 * h, x - h * w)) / (2 * h)
        assert relative(jacobian.times(w, rate=2.0), difference) < 1e-6
        through = (jacobian.matrix() @ w.flatten(1).unsqueeze(2)).squeeze(2)
        torch.testing.assert_close(jacobian.times(w).flatten(1), through)

    def test_the_acceleration_of_a_learned_field_is_that_of_its_flow(self, learned):
        v, x = learned
        h = 1e-4  # the time embedding turns by up to 1000 rad in a unit of time
        with torch.no_grad():
            before, after = (integrate(v, x, "rk4", 4, start=0.4, end=0.4 + way) for way in (-h, h))
        difference = (after - 2 * x + before) / h**2
        assert relative(Jacobian(v, 0.4, x).acceleration(), difference) < 0.005

    @pytest.mark.parametrize("field", [lambda t, x: torch.ones_like(x), lambda t, x: t + 0 * x, lambda t, x: 2 * x])
    def test_of_fields_that_ignore_what_they_are_given(self, field):
        jacobian = Jacobian(field, 0.5, X)
        rate, stretch = field(1.0, X) - field(0.0, X), field(0.0, X + 1) - field(0.0, X)
        torch.testing.assert_close(jacobian.times(torch.zeros_like(X), rate=1.0), rate)
        torch.testing.assert_close(jacobian.matrix(), torch.diag_embed(stretch))
        torch.testing.assert_close(jacobian.largest_singular_value(), stretch[:, 0].abs())


class TestLargestSingularValue:
    def test_after_as_many_products_as_numbers_it_is_exact(self):
        for products in (D, 10 * D):
            torch.testing.assert_close(Jacobian(linear, 0.0, X).largest_singular_value(products), sigma_max(A))

    def test_of_a_learned_field_comes_near_the_exact_jacobians(self, learned):
        jacobian = Jacobian(learned[0], 0.4, learned[1])
        torch.testing.assert_close(jacobian.largest_singular_value(8), sigma_max(jacobian.matrix()), rtol=0.01, atol=0)

    def test_never_exceeds_it_and_beats_the_last_iterate(self):
        n, products = 200, 4
        field = normal(1, n, n, seed=7)
        jacobian = Jacobian(lambda t, x: (field @ x.unsqueeze(2)).squeeze(2), 0.0, normal(1, n))
        start = torch.randn(1, n, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        w = start
        for _ in range(products - 1):
            w = jacobian.transposed_times(jacobian.times(w))
        plain = (jacobian.times(w).norm() / w.norm()).item()
        best = jacobian.largest_singular_value(products, torch.Generator().manual_seed(4)).item()
        assert plain < best < sigma_max(field).item()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_of_rank_one_rounding_adds_nothing(self, dtype):
        matrix = (normal(D, 1) @ normal(1, D, seed=1)).to(dtype)
        jacobian = Jacobian(lambda t, x: x @ matrix.T, 0.0, X.to(dtype))
        expected = sigma_max(matrix).expand(B)
        torch.testing.assert_close(jacobian.largest_singular_value(D), expected, rtol=1e-5, atol=0)

    def test_of_a_nonlinear_field_it_is_local(self):
        jacobian = Jacobian(lambda t, x: x.sin(), 0.0, X)
        torch.testing.assert_close(jacobian.largest_singular_value(D), X.cos().abs().amax(1))

    def test_refuses_no_products(self):
        with pytest.raises(ValueError, match="^products must be at least 1, got 0"):
            Jacobian(linear, 0.0, X).largest_singular_value(0)


def test_spectrum_of_a_damped_rotation_and_of_a_shear():
    """A shear has eigenvalues that say contraction, and a logarithmic norm that does not."""
    matrices = torch.tensor([[[-2.0, -3.0], [3.0, -2.0]], [[-1.0, 6.0], [0.0, -4.0]]])
    least, largest, logarithmic = spectrum(matrices)
    torch.testing.assert_close(least, torch.tensor([-2.0, -4.0]))
    torch.testing.assert_close(largest, torch.tensor([-2.0, -1.0]))
    torch.testing.assert_close(logarithmic, torch.tensor([-2.0, -2.5 + math.sqrt(1.5**2 + 3**2)]))


class TestProfile:
    def test_of_a_rotation(self):
        """L = ω; |ψ''| = ω² r; the way is a chord of 2 r sin(ω / 2), gone at speed ω r."""
        start = torch.tensor([[1.0, 0.0], [0.0, -2.0]], dtype=torch.float64)
        path = profile(rotation, start, times=64, substeps=4)
        radius = start.norm(dim=1).expand(65, 2)
        torch.testing.assert_close(path.lipschitz, torch.full_like(radius, OMEGA))
        torch.testing.assert_close(path.curvature, OMEGA**2 * radius)
        angle = OMEGA * path.times
        torch.testing.assert_close(path.states[:, 0], torch.stack([angle.cos(), angle.sin()], dim=1))
        expected = (OMEGA / (2 * math.sin(OMEGA / 2))) ** 2 - 1
        torch.testing.assert_close(path.straightness, torch.full_like(path.straightness, expected), rtol=1e-3, atol=0)

    def test_of_a_flow_onto_points(self):
        """v = (y - x) / (1 - t), straight at constant speed, has L = 1 / (1 - t) and nothing else."""
        v = lambda t, x: (DRIVE - x) / (2 - t)  # noqa: E731  stretched, so that t = 1 is regular
        path = profile(v, X, times=8)
        rates = (1 / (2 - path.times)).unsqueeze(1).expand(9, B)
        torch.testing.assert_close(path.lipschitz, rates)
        assert path.curvature.max() < 1e-12 and path.straightness.max() < 1e-12
        torch.testing.assert_close(path.states[-1], (X + DRIVE) / 2)

    def test_counts_its_times(self):
        calls = []
        profile(rotation, normal(1, 2), times=3, progress=lambda: calls.append(1))
        assert len(calls) == 4

    def test_refuses_no_times(self):
        with pytest.raises(ValueError, match="^times must be at least 1, got 0"):
            profile(rotation, normal(1, 2), times=0)

    def test_on_a_grid_takes_l_at_the_starts_and_the_largest_m_within(self):
        """x' = 2 t x from 1 is ψ = e^(t²): L = 2 t and ψ'' = (2 + 4 t²) e^(t²), both rising."""
        start = torch.ones(1, 1, dtype=torch.float64)
        path = profile(lambda t, x: 2 * torch.as_tensor(t) * x, start, times=12)
        bend = lambda t: (2 + 4 * t**2) * math.exp(t**2)  # noqa: E731
        for n, ends in ((1, [1]), (3, [1 / 3, 2 / 3, 1]), (12, [k / 12 for k in range(1, 13)])):
            rates, bends = path.on_grid(n)
            torch.testing.assert_close(rates[0], 2 * torch.arange(n, dtype=torch.float64) / n)
            assert bends[0].tolist() == pytest.approx([bend(t) for t in ends], rel=1e-5)
        with pytest.raises(ValueError, match="^num_steps must divide the 12 intervals of the profile, got 8"):
            path.on_grid(8)


def test_straightness_of_a_change_of_speed():
    """Straight on, but at speed 2 t: the mean of (2 t - 1)² is 1 / 3."""
    times = torch.linspace(0, 1, 1001, dtype=torch.float64)
    way = normal(B, D)
    expected = torch.full((B,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(straightness(2 * times.view(-1, 1, 1) * way, way), expected, rtol=1e-5, atol=0)


class TestRecursionBound:
    @pytest.mark.parametrize("n", [1, 2, 16, 100])
    def test_with_the_same_sizes_in_all_steps_it_is_bound_5(self, n):
        sizes = normal(3, 50).abs()
        steps = torch.full((n,), 1 / n, dtype=torch.float64)
        bound = recursion_bound(*sizes.unsqueeze(2), steps)
        torch.testing.assert_close(bound, uniform_grid_bound(*sizes, n), rtol=1e-11, atol=0)

    @pytest.mark.parametrize("n", [1, 4, 64])
    def test_onto_points_it_stays_above_a_quarter_of_m(self, n):
        """L = 1 / (1 - t): the factors telescope to N - j, and the bound is M (N + 1) / (4 N)."""
        rates = 1 / (1 - torch.arange(n, dtype=torch.float64) / n)
        bound = recursion_bound(rates, 8.0, 0.0, [1 / n] * n)
        assert bound.item() == pytest.approx(8 * (n + 1) / (4 * n))

    def test_holds_where_bound_5_is_far_too_large(self):
        """x' = 2 t x from 1; its errors, and half of its L or M being too little."""
        v, start, n = lambda t, x: 2 * t * x, torch.ones(1, 1, dtype=torch.float64), 16
        path = profile(lambda t, x: 2 * torch.as_tensor(t) * x, start, times=64)
        error = (integrate(v, start, "euler", n) - math.e).abs().item()
        rates, bends = path.on_grid(n)
        bound = recursion_bound(rates, bends, 0.0, [1 / n] * n).item()
        assert error < bound < 1.3 * error
        assert uniform_grid_bound(path.lipschitz.max(), path.curvature.max(), 0.0, n).item() > 2 * bound
        for part in ((0.5 * rates, bends), (rates, 0.5 * bends)):
            assert recursion_bound(*part, 0.0, [1 / n] * n).item() < error

    def test_refuses_what_is_no_size_and_no_step(self):
        with pytest.raises(ValueError, match="^curvature must be finite and at least 0, got -1"):
            recursion_bound(1.0, -1.0, 0.0, [1.0])
        with pytest.raises(ValueError, match="^steps must be one or more step sizes"):
            recursion_bound(1.0, 1.0, 0.0, [])
