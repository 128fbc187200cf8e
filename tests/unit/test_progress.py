"""Progress is seen on a terminal and readable in a log file."""

import io

import pytest

from sora_train.base.progress import Progress, duration


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(seconds_a_step: float, total: int = 100, start: int = 0) -> list[str]:
    clock, log = Clock(), io.StringIO()
    with Progress(total, "training", start=start, file=log, clock=clock) as bar:
        for step in range(start + 1, total + 1):
            clock.now += seconds_a_step
            bar.update(step, loss=1 / step)
    return log.getvalue().splitlines()


def test_a_log_file_gets_first_last_and_a_line_every_ten_seconds():
    steps = [int(line.split()[1].split("/")[0]) for line in run(seconds_a_step=1.0)]
    assert steps == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]


def test_a_fast_run_writes_two_lines_and_a_slow_one_each_step():
    assert len(run(seconds_a_step=0.001)) == 2
    assert len(run(seconds_a_step=30, total=5)) == 5


def test_lines_carry_step_time_left_and_fields():
    line = run(seconds_a_step=2.0)[1]
    assert line == "training 6/100  ETA 3:08 min  loss 0.1667"


def test_a_resumed_run_estimates_by_its_own_pace():
    assert "ETA 3:08 min" in run(seconds_a_step=2.0, total=1100, start=1000)[1]


def test_the_last_step_seen_is_printed_when_the_run_breaks_off():
    clock, log = Clock(), io.StringIO()
    with (
        pytest.raises(KeyboardInterrupt),
        Progress(100, "training", file=log, clock=clock) as bar,
    ):
        bar.update(1)
        bar.update(2)
        raise KeyboardInterrupt
    assert [line.split()[1] for line in log.getvalue().splitlines()] == ["1/100", "2/100"]


def test_other_ranks_are_silent():
    for file in (io.StringIO(), Terminal()):
        with Progress(2, "training", enabled=False, file=file) as bar:
            bar.update(1, loss=0.5)
            bar.update(2)
        assert file.getvalue() == ""


def test_a_terminal_gets_a_live_bar():
    terminal = Terminal()
    with Progress(4, "training", file=terminal) as bar:
        for step in range(1, 5):
            bar.update(step, loss=0.25)
    shown = terminal.getvalue()
    assert "4/4" in shown and "loss 0.25" in shown and "\x1b[" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1:00 min"),
        (187, "3:07 min"),
        (7500, "2:05 h"),
        (4 * 86400 + 3 * 3600 + 59, "4 d 3 h"),
    ],
)
def test_durations_read_naturally(seconds: float, text: str):
    assert duration(seconds) == text
