"""Over what the processes of `sora sample` are spread: prompts, the rows of a call of the model, a clip's tokens."""

import math
from dataclasses import asdict, dataclass, fields

from sora_train.config.sections.model import ModelConfig
from sora_train.errors import UserError
from sora_train.parallel.degrees import GIVE_NO_LSE, Degrees

AUTO = "auto"


@dataclass(frozen=True)
class Layout:
    """How many processes each axis has; their product is all of them.

    Ranks are numbered with `context` fastest, then `guidance`, then `prompts`: those that talk most are neighbours.
    """

    prompts: int = 1
    """Teams; each makes clips of its own."""
    guidance: int = 1
    """Parts of a team among which the rows of a call are dealt out: with and without caption, clip by clip."""
    context: int = 1
    """Processes that share the tokens of each row."""

    @property
    def team(self) -> int:
        """Processes that make a clip together."""
        return self.guidance * self.context

    def degrees(self, num_heads: int) -> Degrees:
        """`context` as exchanges of heads as far as their number allows, and as a ring beyond."""
        ulysses = math.gcd(self.context, num_heads)
        return Degrees(1, 1, ulysses, self.context // ulysses)

    def __str__(self) -> str:
        return ",".join(f"{axis}={count}" for axis, count in asdict(self).items())


AXES = tuple(field.name for field in fields(Layout))


def layout_of(text: str, size: int, clips: int, views: int, batch: int) -> Layout:
    """The layout that `--parallel` names; axes it does not name are filled in the order prompts, guidance, context.

    Args:
        size: processes that are running.
        clips: to be made in all.
        views: rows of a clip in a call: 1 without guidance, 2 with it, 3 with guidance by condition frames too.
        batch: clips that are made at a time.

    Raises:
        UserError: no such axis, a product that is not `size`, or processes that would have nothing to do.
    """
    asked = _asked(text)
    left = max(1, size // math.prod(asked.values()))
    for axis, most in (("prompts", clips), ("guidance", views), ("context", left)):
        if axis not in asked:
            asked[axis] = max(n for n in range(1, left + 1) if left % n == 0 and n <= max(1, most))
            left //= asked[axis]
    layout = Layout(**asked)
    product = math.prod(asked.values())
    if product != size:
        raise UserError(
            f"--parallel {layout} is for {product} processes, and {size} {'is' if size == 1 else 'are'} running; "
            f"start {product} (torchrun --nproc-per-node {product} -m sora_train sample ...), or leave an axis out"
        )
    if layout.prompts > clips:
        raise UserError(
            f"--parallel {layout} spreads clips over {layout.prompts} teams, and there are {clips} to make; "
            f"take prompts={clips} or fewer"
        )
    rows = views * min(batch, -(-clips // layout.prompts))
    if layout.guidance > rows:
        raise UserError(
            f"--parallel {layout} deals out the rows of a call over {layout.guidance} processes, and there are {rows} "
            f"({views} a clip); take guidance={rows} or fewer, and context for the others"
        )
    return layout


def _asked(text: str) -> dict[str, int]:
    """`prompts=2,context=4` as numbers; `auto` names no axis."""
    found: dict[str, int] = {}
    for part in [] if text in ("", AUTO) else text.split(","):
        axis, _, count = part.partition("=")
        if axis not in AXES or axis in found or not count.isdecimal() or int(count) < 1:
            raise UserError(
                f"--parallel is '{text}', of which '{part}' cannot be; write {AUTO}, or AXIS=NUMBER once each for some "
                f"of {', '.join(AXES)}, for example prompts=2,guidance=2"
            )
        found[axis] = int(count)
    return found


def check_context(layout: Layout, cfg: ModelConfig) -> None:
    """Raises UserError where the model's attention cannot be cut so."""
    if layout.degrees(cfg.num_heads).ring > 1 and cfg.attention in GIVE_NO_LSE:
        raise UserError(
            f"--parallel context={layout.context} needs a ring beyond the model's {cfg.num_heads} heads, and "
            f"model.attention={cfg.attention} cannot work on a part of the keys; take context="
            f"{math.gcd(layout.context, cfg.num_heads)}"
        )
