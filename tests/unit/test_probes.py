"""The laws that probes measure, on rendered clips that obey them and on clips that break them by a known amount."""

from dataclasses import replace

import numpy as np
import pytest

from sora_train.data.shapes.scene import Prompt, Thing
from sora_train.data.shapes.world import COLOURS, SHAPES, render, scene_of, track
from sora_train.evaluation.cases import Sampled, asked_by
from sora_train.evaluation.probes.behind import BEHIND, FROM, WAY, passage
from sora_train.evaluation.probes.blobs import blobs
from sora_train.evaluation.probes.bounce import BOUNCE
from sora_train.evaluation.probes.count import COUNT
from sora_train.evaluation.probes.every import PROBES

SIZE = (9, 48, 48, 8.0)


def scene(shape: str = "circle", colour: str = "red", motion: str = "still", seed: int = 0, **more):
    return replace(scene_of(Prompt("", colour, shape, motion), seed), **more)


def things(*places: tuple[str, float, float]) -> tuple[Thing, ...]:
    return tuple(Thing("circle", colour, "small", x, y, 0.0, 0.14) for colour, x, y in places)


def measured(probe, clip: np.ndarray, facts, fps: float = 8.0) -> dict[str, float]:
    case = replace(probe.ask(*SIZE, 1)[0], facts=facts)
    return probe.measure(Sampled(case, clip, fps))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_blob_has_the_area_and_the_place_of_the_rendered_thing(shape: str, colour: str):
    made = scene(shape, colour, "right")
    path = track(made, made.things[0])
    for frame, found in enumerate(blobs(render(made))):
        (blob,) = found
        assert blob.colour == colour
        assert abs(blob.x * 48 - path.x[frame]) < 1.2 and abs(blob.y * 48 - path.y[frame]) < 1.2
        assert 0.5 * np.pi < blob.area * 48**2 / path.radius[frame] ** 2 < 1.2 * np.pi


@pytest.mark.parametrize(
    ("places", "asked", "share"),
    [
        ([("red", 0.5, 0.5)], 1, 1.0),
        ([("red", 0.25, 0.5), ("blue", 0.75, 0.5)], 2, 1.0),
        ([("red", 0.25, 0.5), ("red", 0.75, 0.5)], 2, 1.0),
        ([("red", 0.25, 0.5), ("blue", 0.75, 0.5)], 1, 0.0),
        ([("red", 0.5, 0.5)], 2, 0.0),
        ([], 1, 0.0),
    ],
)
def test_things_are_counted(places, asked: int, share: float):
    clip = render(scene(things=things(*places)))
    assert measured(COUNT, clip, asked) == {"count_holds": share}


def test_a_thing_that_comes_for_three_of_nine_frames_is_three_wrong():
    one, two = (
        render(scene(things=things(*places)))
        for places in ([("red", 0.25, 0.5)], [("red", 0.25, 0.5), ("cyan", 0.75, 0.5)])
    )
    clip = np.concatenate([one[:6], two[6:]])
    assert measured(COUNT, clip, 1)["count_holds"] == pytest.approx(6 / 9)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", ["circle", "square", "ring"])
def test_a_rendered_bounce_obeys_its_law(shape: str, seed: int):
    found = measured(BOUNCE, render(scene(shape, "green", "bounce", seed)), "green")
    assert found["bounce_fit"] > 0.97 and found["bounce_speed"] > 0.85


def test_a_bounce_that_comes_back_at_half_its_speed_is_told_by_that_number():
    made = scene("circle", "red", "bounce")
    y = track(made, made.things[0]).y / 48
    y[4:] = y[4] + (y[4:] - y[4]) / 2
    frames = [render(scene(things=things(("red", 0.5, at)), num_frames=1))[0] for at in y]
    found = measured(BOUNCE, np.stack(frames), "red")
    assert found["bounce_speed"] == pytest.approx(0.5, abs=0.05) and found["bounce_fit"] < 0.9


@pytest.mark.parametrize("motion", ["still", "rotate"])
def test_what_stays_where_it_is_has_not_bounced(motion: str):
    clip = render(scene("square", "red", motion))
    assert measured(BOUNCE, clip, "red") == {"bounce_fit": 0.0, "bounce_speed": 0.0}


def test_what_only_falls_fits_worse_than_a_bounce():
    found = measured(BOUNCE, render(scene("circle", "red", "down")), "red")
    assert found["bounce_fit"] < 0.3


def test_behind_the_square_the_circle_is_hidden_and_comes_back():
    clip = passage("red", "blue", *SIZE)
    seen = [[blob.colour for blob in found] for found in blobs(clip)]
    assert "red" in seen[0] and "red" not in seen[4] and "red" in seen[8]
    assert all("blue" in colours for colours in seen)
    facts = BEHIND.ask(*SIZE, 1)[0].facts
    facts = replace(facts, mover="red", screen="blue")
    found = measured(BEHIND, clip, facts)
    assert found["behind_returns"] == 1 and found["behind_path"] < 0.02


def test_a_circle_that_stays_behind_or_comes_out_elsewhere_is_told():
    clip, facts = passage("red", "blue", *SIZE), BEHIND.ask(*SIZE, 1)[0].facts
    facts = replace(facts, mover="red", screen="blue")
    gone = np.concatenate([clip[:5], np.repeat(clip[4:5], 4, axis=0)])
    assert measured(BEHIND, gone, facts) == {"behind_returns": 0.0}
    back = np.concatenate([clip[:5], clip[3::-1]])  # it turns round
    found = measured(BEHIND, back, facts)
    assert found["behind_path"] == pytest.approx(WAY, abs=0.03) and facts.x == FROM + WAY


def test_probes_ask_in_words_that_the_world_has_and_no_more_than_wanted():
    names = [name for probe in PROBES for name in probe.metrics]
    assert len(names) == len(set(names))
    for probe in PROBES:
        cases = probe.ask(*SIZE, 5)
        assert len(cases) == 5 and len({case.prompt for case in cases}) == 5
        assert all(case.group == probe.name for case in cases)
        assert set(probe.measure(Sampled(cases[0], passage("red", "blue", *SIZE), 8.0))) <= set(
            probe.metrics
        )
    for probe in (BOUNCE, BEHIND):
        assert all(asked_by(case.prompt) for case in probe.ask(*SIZE, 5))
    assert BOUNCE.ask(1, 48, 48, 8.0, 5) == [] and BEHIND.ask(5, 48, 48, 8.0, 5) == []
