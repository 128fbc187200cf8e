"""A sample's draws depend on its key alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_train.base.seeding import key_seed
from sora_train.diffusion import draws
from sora_train.diffusion.draws import draw_noise, draw_uniform

GOLDEN_UNIFORM = 0.3297385
GOLDEN_NOISE = [0.3970602, 1.1154857, 0.3962085, 1.1586138]

ids = st.one_of(st.integers(0, 10**12), st.text("ab/1", max_size=8))
samples = st.lists(st.tuples(st.integers(0, 9), ids), min_size=1, max_size=6)


@given(st.integers(0, 2**63), samples, st.randoms())
@settings(deadline=None, max_examples=40)
def test_independent_of_batch_and_order(seed, batch, random):
    noise, uniform = draw_noise(seed, "noise", batch, (2, 3)), draw_uniform(seed, "noise", batch)
    order = random.sample(range(len(batch)), len(batch))
    torch.rand(3)  # the process's generator has no part in it
    shuffled = [batch[i] for i in order]
    assert torch.equal(draw_noise(seed, "noise", shuffled, (2, 3)), noise[order])
    assert torch.equal(draw_uniform(seed, "noise", shuffled), uniform[order])
    assert torch.equal(draw_noise(seed, "noise", batch[-1:], (2, 3))[0], noise[-1])


def test_every_part_of_the_key_matters():
    keys = [
        (1, "noise", (2, 3)),
        (2, "noise", (2, 3)),
        (1, "timestep", (2, 3)),
        (1, "noise", (3, 3)),
        (1, "noise", (2, 4)),
    ]
    values = {draw_uniform(seed, stream, [sample]).item() for seed, stream, sample in keys}
    assert len(values) == len(keys)


def test_every_bit_of_a_key_makes_another_stream(monkeypatch: pytest.MonkeyPatch):
    """torch's generator on the CPU takes 32 of the 63: keys that are 2^32 apart would share their noise."""
    key = key_seed(7, "noise", 0, 12)
    streams = set()
    for other in (key, key + 2**32, *(key ^ (1 << bit) for bit in range(63))):
        monkeypatch.setattr(draws, "key_seed", lambda *_, other=other: other)
        noise, uniform = draw_noise(0, "", [(0, 0)], (3,)), draw_uniform(0, "", [(0, 0)])
        streams.add((*noise.flatten().tolist(), uniform.item()))
    assert len(streams) == 65


def test_values_never_change():
    """Golden: a changed hash or draw order would make every old run irreproducible."""
    key = [(0, "clip-12")]
    assert draw_uniform(7, "noise", key).dtype == torch.float32
    torch.testing.assert_close(draw_uniform(7, "noise", key), torch.tensor([GOLDEN_UNIFORM]))
    noise = draw_noise(7, "noise", key, (2, 2)).flatten()
    torch.testing.assert_close(noise, torch.tensor(GOLDEN_NOISE), rtol=1e-5, atol=1e-6)


def test_distributions():
    many = [(0, i) for i in range(4000)]
    uniform, noise = draw_uniform(0, "timestep", many), draw_noise(0, "noise", many, (4,))
    assert abs(uniform.mean() - 0.5) < 0.02
    assert abs(uniform.std() - 12**-0.5) < 0.01
    assert 0 <= uniform.min() < uniform.max() < 1
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
