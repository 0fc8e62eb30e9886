import json
import math

import pytest
import torch

from data_prep.errors import UserError
from medpretrain.tracking.follow import Follower
from medpretrain.tracking.metrics_log import MetricsLog, MetricsTail, read_metrics, read_rollbacks, rolled_back_file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def steps(path):
    return [row["step"] for row in read_metrics(path)]


def test_a_row_can_be_read_as_soon_as_it_is_written(path):
    with MetricsLog(path) as log:
        log.append({"step": 1, "loss": 0.1 + 0.2, "phase": "warm-up", "collapsed": False, "note": None})
        (row,) = read_metrics(path)
    assert row.pop("time") > 1.7e9
    assert row == {"step": 1, "loss": 0.1 + 0.2, "phase": "warm-up", "collapsed": False, "note": None}


def test_nan_and_infinity_stay_valid_json_and_come_back(path):
    with MetricsLog(path) as log:
        log.append({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "time": 5.0})
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict == {"step": 1, "a": "nan", "b": "inf", "c": "-inf", "time": 5.0}
    (row,) = read_metrics(path)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_a_resumed_run_drops_the_rows_it_will_measure_again(path):
    with MetricsLog(path) as log:
        for step in (1, 2, 2, 3, 4):
            log.append({"step": step})
        log.truncate_after(2)
        assert steps(path) == [1, 2, 2]
        log.append({"step": 3})
    assert steps(path) == [1, 2, 2, 3]
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["metrics.jsonl", "metrics.rolled_back.jsonl"]


def test_dropped_rows_are_kept_with_their_positions_and_nothing_is_rolled_back_where_nothing_was_dropped(path):
    with MetricsLog(path) as log:
        log.truncate_after(0)
        for step in (1, 2, 2, 3):
            log.append({"step": step, "time": 5.0, "a": math.nan})
        log.truncate_after(3)
        assert read_rollbacks(path) == []
        log.truncate_after(1)
        log.append({"step": 2, "time": 6.0})
        log.truncate_after(1)
    first, second = read_rollbacks(path)
    assert (first.kept_to, [position for position, _ in first.rows]) == (1, [(2, 1), (2, 2), (3, 1)])
    assert (second.kept_to, second.rows) == (1, [((2, 1), {"step": 2, "time": 6.0})])
    assert read_rollbacks(path, first.end) == [second]


@pytest.mark.parametrize("dropped", [True, False])
def test_a_rollback_cut_off_by_a_crash_is_ended_by_the_next_start(path, dropped):
    with MetricsLog(path) as log:
        for step in (1, 2, 3):
            log.append({"step": step, "time": 5.0})
    rows = path.read_text().splitlines(keepends=True)
    rolled_back_file(path).write_text("".join(rows[1:]) + '{"step":')
    if dropped:
        path.write_text(rows[0])
    assert read_rollbacks(path) == []
    MetricsLog(path).close()
    (found,) = read_rollbacks(path)
    assert (found.kept_to, len(found.rows)) == (1, 2)


def test_a_follower_sees_a_rollback_before_any_row_that_was_measured_again(path, monkeypatch):
    """Also if the run goes back just while the follower reads."""
    with MetricsLog(path) as log:
        for step in range(6):
            log.append({"step": step, "time": step, "loss": 1.0})
        follower = Follower(path)
        follower.position = follower.rows()[-1][0]
        log.append({"step": 6, "time": 6, "loss": 1.0})
        real = MetricsTail.read

        def read(self, limit):
            monkeypatch.setattr(MetricsTail, "read", real)
            log.truncate_after(2)
            for step in range(3, 9):
                log.append({"step": step, "time": step + 100, "loss": 1.0 if step < 5 else 2.0})
            return real(self, limit)

        monkeypatch.setattr(MetricsTail, "read", read)
        rows = follower.rows()
    assert (follower.rewound_to, [position[0] for position, _ in rows]) == (2, list(range(3, 9)))
    times = [point.time_ms // 1000 for placed in rows for point in follower.points(placed)]
    assert times == [3, 4, 105, 106, 107, 108]


def test_a_torn_last_line_is_dropped_and_said(path, caplog):
    with MetricsLog(path) as log:
        log.append({"step": 1})
    with open(path, "a") as file:
        file.write('{"step": 2, "lo')
    assert steps(path) == [1]
    with MetricsLog(path) as log:
        log.append({"step": 2})
    assert steps(path) == [1, 2]
    assert "torn line of 15 bytes" in caplog.text


def test_a_broken_line_inside_is_refused_with_its_number(path):
    path.parent.mkdir()
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"line 2"):
        read_metrics(path)
    with pytest.raises(UserError, match=r"line 2"):
        MetricsLog(path)
    path.write_text('{"loss": 1}\n')
    with pytest.raises(UserError, match=r"line 1.*step"):
        read_metrics(path)


def test_no_file_is_a_clear_error(path):
    with pytest.raises(UserError, match="no metrics"):
        read_metrics(path)


def test_a_tensor_or_a_falling_step_is_a_programmers_error(path):
    with MetricsLog(path) as log:
        log.append({"step": 5})
        with pytest.raises(TypeError, match="loss"):
            log.append({"step": 6, "loss": torch.tensor(1.0)})
        with pytest.raises(AssertionError, match="truncate_after"):
            log.append({"step": 4})
    with MetricsLog(path) as log, pytest.raises(AssertionError):
        log.append({"step": 4})
    assert steps(path) == [5]


def test_a_tail_gives_each_row_once_and_only_whole_ones(path):
    tail = MetricsTail(path)
    assert tail.read(10) == []
    with MetricsLog(path) as log:
        for step in (1, 2, 2):
            log.append({"step": step})
        assert [position for position, _ in tail.read(2)] == [(1, 1), (2, 1)]
        with open(path, "a") as torn:
            torn.write('{"step": ')
        assert [position for position, _ in tail.read(10)] == [(2, 2)]
        with open(path, "a") as torn:
            torn.write("3}\n")
        assert tail.read(10) == [((3, 1), {"step": 3})]


def test_a_tail_starts_again_when_rows_are_dropped(path):
    tail = MetricsTail(path)
    with MetricsLog(path) as log:
        for step in (1, 2, 3):
            log.append({"step": step})
        assert len(tail.read(10)) == 3
        log.truncate_after(1)
        log.append({"step": 2})
        assert [position for position, _ in tail.read(10)] == [(1, 1), (2, 1)]
