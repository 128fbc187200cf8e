"""Draws the rooms of `sora_train/` on their floors, with an arrow from each room to those it imports.

    python tests/house_picture.py docs/images/house.svg

Arrows that a path of other arrows implies are left out. An import that goes up is drawn in red; tests forbid them.
"""

import ast
import math
import random
import sys
import textwrap
from itertools import combinations
from pathlib import Path
from xml.sax.saxutils import escape

from layering import FLOORS, House, arrows, room_imports

WIDTH, BOX_WIDTH, BOX_HEIGHT, ROW_HEIGHT, MARGIN = 1000, 236, 66, 108, 12
COLUMNS = 9
Point = tuple[float, float]
Arrow = tuple[str, str]

STYLE = """
  text { font-family: Helvetica, Arial, sans-serif; text-anchor: middle; fill: #1d2733 }
  .room { font-size: 16px; font-weight: bold } .idea { font-size: 11.5px; fill: #4a5666 }
  rect { fill: #f3f6fa; stroke: #8fa1b5 } line { stroke: #5b6f86; stroke-width: 1.3 }
  .floor { stroke: #e4e9ef; stroke-width: 1 } .up { stroke: #c62828; stroke-width: 2 }
"""


def floors_from_the_top(rooms: set[str]) -> list[list[str]]:
    rows = [[room for room in floor if room in rooms] for floor in reversed(FLOORS)]
    return [row for row in rows if row]


def idea(house: House, room: str) -> str:
    """The first sentence of the room's docstring."""
    path = house.modules[f"sora_train.{room}"]
    text = (ast.get_docstring(house.trees[path]) or "").split("\n\n")[0].replace("\n", " ")
    return text.split(". ")[0].rstrip(".").replace("`", "")


class Plan:
    """A column for each room, chosen so that arrows run straight and pass no other room."""

    def __init__(self, rows: list[list[str]], arrows: list[Arrow]):
        self.rows, self.arrows = rows, arrows
        self.row_of = {room: number for number, row in enumerate(rows) for room in row}
        self.column = {
            room: (2 * place + 1) * COLUMNS // (2 * len(row))
            for row in rows
            for place, room in enumerate(row)
        }

    def centre(self, room: str) -> float:
        span = WIDTH - 2 * MARGIN - BOX_WIDTH
        return MARGIN + BOX_WIDTH / 2 + span * self.column[room] / (COLUMNS - 1)

    def top(self, room: str) -> float:
        return MARGIN + self.row_of[room] * ROW_HEIGHT

    def lines(self) -> dict[Arrow, tuple[Point, Point]]:
        """Each arrow from the lower edge of its room to the upper edge of the other, side by side on both."""
        starts, ends = {}, {}
        for room in self.row_of:
            leaving = [arrow for arrow in self.arrows if arrow[0] == room]
            coming = [arrow for arrow in self.arrows if arrow[1] == room]
            starts |= self._ports(room, leaving, other=1, y=self.top(room) + BOX_HEIGHT)
            ends |= self._ports(room, coming, other=0, y=self.top(room))
        return {arrow: (starts[arrow], ends[arrow]) for arrow in self.arrows}

    def _ports(self, room: str, arrows: list[Arrow], other: int, y: float) -> dict[Arrow, Point]:
        by_side = sorted(arrows, key=lambda arrow: self.centre(arrow[other]))
        step = BOX_WIDTH / (len(arrows) + 1)
        left = self.centre(room) - BOX_WIDTH / 2
        return {arrow: (left + step * (place + 1), y) for place, arrow in enumerate(by_side)}

    def cost(self) -> float:
        lines = self.lines()
        width = sum(abs(end[0] - start[0]) for start, end in lines.values())
        aside = sum(abs(self.centre(room) - WIDTH / 2) for room in self.row_of)
        hidden = sum(self._passes(line, room) for line in lines.values() for room in self.row_of)
        crossed = sum(cross(*pair) for pair in combinations(lines.values(), 2))
        return (2 * width + aside) / WIDTH + 4 * crossed + 100 * hidden + 1000 * self._overlaps()

    def _passes(self, line: tuple[Point, Point], room: str) -> bool:
        (x0, y0), (x1, y1) = line
        middle = self.top(room) + BOX_HEIGHT / 2
        if not y0 < middle < y1:
            return False
        at_room = [x0 + (x1 - x0) * (y - y0) / (y1 - y0) for y in (middle - 40, middle + 40)]
        reach = BOX_WIDTH / 2 + 8
        return min(at_room) < self.centre(room) + reach and max(at_room) > self.centre(room) - reach

    def _overlaps(self) -> int:
        return sum(
            abs(self.centre(one) - self.centre(two)) < BOX_WIDTH + 30
            for row in self.rows
            for one, two in combinations(row, 2)
        )

    def improve(self, starts: int = 6, tries: int = 4000) -> None:
        """Moves up to three rooms at a time by annealing, from several starts; the same plan every time."""
        first, plans = self.column, []
        for seed in range(starts):
            self.column = first
            plans.append(self._anneal(random.Random(seed), tries))
        _, self.column = min(plans, key=lambda plan: plan[0])

    def _anneal(self, draw: random.Random, tries: int) -> tuple[float, dict[str, int]]:
        cost = self.cost()
        best = cost, self.column
        for number in range(tries):
            column, heat = self.column, 20 * (1 - number / tries) ** 3
            moved = draw.sample(sorted(column), draw.choice((1, 1, 2, 3)))
            self.column = column | {room: draw.randrange(COLUMNS) for room in moved}
            changed = self.cost()
            if changed <= cost or draw.random() < math.exp((cost - changed) / max(heat, 1e-9)):
                cost = changed
                best = min(best, (cost, self.column), key=lambda plan: plan[0])
            else:
                self.column = column
        return best


def cross(one: tuple[Point, Point], two: tuple[Point, Point]) -> bool:
    def side(a: Point, b: Point, c: Point) -> bool:
        return (b[0] - a[0]) * (c[1] - a[1]) > (b[1] - a[1]) * (c[0] - a[0])

    return side(*one, two[0]) != side(*one, two[1]) and side(*two, one[0]) != side(*two, one[1])


def svg(house: House) -> str:
    imports = {pair: count for pair, count in room_imports(house).items() if "__main__" not in pair}
    rooms = {room for pair in imports for room in pair}
    row_of = {room: number for number, row in enumerate(floors_from_the_top(rooms)) for room in row}
    down = {pair for pair in imports if row_of[pair[0]] < row_of[pair[1]]}
    plan = Plan(floors_from_the_top(rooms), sorted(arrows(house)))
    plan.improve()
    height = 2 * MARGIN + ROW_HEIGHT * (len(plan.rows) - 1) + BOX_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#5b6f86"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" style="fill: white; stroke: none"/>',
    ]
    parts += [arrow_svg(arrow, *line) for arrow, line in plan.lines().items()]
    for source, target in sorted(set(imports) - down):
        start = (plan.centre(source), plan.top(source))
        end = (plan.centre(target), plan.top(target) + BOX_HEIGHT)
        parts.append(arrow_svg((source, target), start, end, "up"))
    parts += [room_svg(plan, room, idea(house, room)) for room in sorted(rooms)]
    return "\n".join([*parts, "</svg>", ""])


def arrow_svg(arrow: Arrow, start: Point, end: Point, kind: str = "down") -> str:
    (x0, y0), (x1, y1) = start, end
    return (
        f'<line id="{"-".join(arrow)}" class="{kind}" x1="{x0:.0f}" y1="{y0:.0f}" x2="{x1:.0f}" y2="{y1:.0f}"'
        ' marker-end="url(#head)"/>'
    )


def room_svg(plan: Plan, room: str, sentence: str) -> str:
    x, y = plan.centre(room), plan.top(room)
    lines = textwrap.wrap(sentence, 40, max_lines=3, placeholder=" ...")
    first = y + 20 + (3 - len(lines)) * 4
    texts = [f'<text class="room" x="{x:.0f}" y="{first:.0f}">{room}</text>'] + [
        f'<text class="idea" x="{x:.0f}" y="{first + 15 + 13 * number:.0f}">{escape(line)}</text>'
        for number, line in enumerate(lines)
    ]
    box = f'<rect x="{x - BOX_WIDTH / 2:.0f}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"/>'
    return "\n".join([box, *texts])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(svg(House()), encoding="utf-8")
