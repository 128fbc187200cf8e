"""The step cache skips what it says, never the first or the last step, and clips do not depend on each other."""

import functools

import pytest
import torch

from sora_train.config.compose import compose
from sora_train.diffusion.draws import draw_noise
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives.spec import spec_of
from sora_train.sampling.pipeline import sample_latents
from sora_train.sampling.step_cache import CachedBlocks, StepCache, cached_steps, relative_change

PROMPTS = ["red circle moves left", "a large blue square", "ring"]


@functools.cache
def parts():
    """A model whose every weight is drawn, so that its output is not 0."""
    cfg = compose(["experiment=parity_tiny"]).config
    model = TextToVideo(cfg.model, cfg.text, seed=0).requires_grad_(False).eval()
    draw = torch.Generator().manual_seed(1)
    model.transformer.proj_out.weight.normal_(0, 0.1, generator=draw)
    vae = VideoVAE.from_config(cfg.vae)
    return model, spec_of(cfg, vae, "").replace(num_steps=6, guidance_scale=2.0), vae


def sampled(threshold: float, prompts=tuple(PROMPTS), rows=(0, 1, 2), **changes):
    """Latents, and how many rows went through the blocks."""
    model, spec, vae = parts()
    noise = draw_noise(3, "sample", [(0, row) for row in rows], vae.latent_shape(5, 16, 32))
    count = []
    block = model.transformer.blocks[0]
    hook = block.register_forward_pre_hook(lambda _, given: count.append(len(given[0])))
    try:
        asked = [prompts[row] for row in rows]
        made = sample_latents(
            model, spec.replace(**changes), asked, noise, 8.0, step_cache=threshold
        )
    finally:
        hook.remove()
    return made, count


@pytest.mark.parametrize("solver", ["euler", "heun", "unipc"])
def test_a_threshold_that_nothing_is_below_gives_the_same_bits(solver):
    plain, count = sampled(0.0, solver=solver)
    cached, computed = sampled(1e-30, solver=solver)
    assert torch.equal(plain, cached)
    assert count == computed


@pytest.mark.parametrize(
    ("solver", "steps"), [("euler", 6), ("unipc", 6), ("euler", 2), ("euler", 1)]
)
def test_first_and_last_step_are_computed_however_high_the_threshold(solver, steps):
    made, computed = sampled(1e9, solver=solver, num_steps=steps)
    # With and without caption, three clips each.
    assert computed == [6, 6][: min(steps, 2)]
    assert torch.isfinite(made).all()
    if steps <= 2:
        assert torch.equal(made, sampled(0.0, solver=solver, num_steps=steps)[0])


def test_more_is_skipped_and_more_is_wrong_the_higher_the_threshold():
    exact, count = sampled(0.0)
    passes, errors = [sum(count)], [0.0]
    for threshold in (0.05, 0.2, 1e9):
        made, computed = sampled(threshold)
        passes.append(sum(computed))
        errors.append(float((made - exact).square().mean()))
    assert passes == sorted(passes, reverse=True) and passes[-1] < passes[0]
    assert errors == sorted(errors) and errors[-1] > 0


def test_a_clip_does_not_depend_on_the_clips_beside_it():
    together, computed = sampled(0.2)
    assert sum(computed) < 6 * 6, "nothing was skipped, so nothing was tested"
    for row in range(3):
        alone, _ = sampled(0.2, rows=(row,))
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=2e-5)


def test_where_guidance_begins_or_ends_the_blocks_are_computed():
    _, computed = sampled(1e9, guidance_from=0.4, guidance_to=0.8)
    # Without guidance above 0.8, with it down to 0.4, and again without: each begins anew, and the last step.
    assert computed == [3, 6, 3, 3]


def test_a_skipped_step_adds_what_the_blocks_added_last():
    class Adds(torch.nn.Module):
        """A block that adds the modulation's gate of the call."""

        def __init__(self):
            super().__init__()
            self.norm1 = torch.nn.Identity()
            self.scale_shift_table = torch.nn.Parameter(torch.zeros(1, 6, 4))

        def forward(self, x, captions, modulation, table, mask, images=None):
            return x + modulation[:, :, 2].unsqueeze(2)

    cache = StepCache(clips=1, threshold=0.5, last=0.0)
    blocks = CachedBlocks(torch.nn.ModuleList([Adds()]), cache)

    def call(x: float, gate: float) -> float:
        modulation = torch.zeros(1, 1, 6, 4)
        modulation[:, :, 2] = gate
        out = blocks(torch.full((1, 1, 2, 4), x), torch.zeros(1, 1, 4), modulation, None, None)
        return float(out.mean())

    assert call(1.0, gate=10.0) == 11.0
    assert call(1.3, gate=20.0) == pytest.approx(11.3)  # changed by 0.3 in all
    assert call(1.5, gate=30.0) == pytest.approx(11.5)  # by 0.3 + 0.2 / 1.3 = 0.454
    assert call(1.65, gate=40.0) == pytest.approx(41.65)  # and 0.1 more: computed
    assert call(1.65, gate=50.0) == pytest.approx(41.65)
    assert (cache.asked, cache.computed) == (5, 2)


def test_the_change_is_relative_and_of_all_views_of_a_clip():
    before = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1, 1)
    after = torch.tensor([1.5, 2.0, 3.0, 7.0]).view(4, 1, 1, 1)
    # Two clips, each with and without its caption: rows 0 and 2, 1 and 3.
    assert relative_change(before, after, clips=2).tolist() == pytest.approx([0.5 / 4, 3 / 6])


def test_the_model_is_itself_again_afterwards_even_after_an_error():
    model, *_ = parts()
    blocks = model.transformer.blocks
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(RuntimeError), cached_steps(model, StepCache(1, 0.1, 0.0)):
        assert isinstance(model.transformer.blocks[0], CachedBlocks)
        raise RuntimeError
    assert model.transformer.blocks is blocks
    assert [name for name, _ in model.named_parameters()] == names
