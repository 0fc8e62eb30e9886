"""What DeepSpeed would do without a word is refused: a hostfile that is missing, or that does not read as one."""

from __future__ import annotations

import random

import pytest
from deepspeed.launcher import runner

from data_prep.errors import UserError
from launchers.hostfile import read_hostfile, selected


def written(folder, text):
    path = folder / "hostfile"
    path.write_text(text)
    return path


def test_hosts_and_slots_come_in_the_order_of_the_file_without_comments(tmp_path):
    found = read_hostfile(written(tmp_path, "# ours\nz slots=2\n\n a-1.x\tslots=1  # the small one\n"))
    assert list(found.items()) == [("z", [0, 1]), ("a-1.x", [0])]


def test_a_missing_hostfile_is_an_error_and_no_local_run(tmp_path):
    with pytest.raises(UserError, match=r"there is no hostfile .*none; give one with --hostfile"):
        read_hostfile(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a slots=2\nb\n", r"hostfile:2: 'b' is no host with its slots; it reads like `gpu01 slots=8`"),
        ("a slots=two\n", "hostfile:1: 'a slots=two' is no host"),
        ("a slot=2\n", "hostfile:1: 'a slot=2' is no host"),
        ("a slots=2 b slots=2\n", "hostfile:1: "),
        ("a slots=2\n#\na slots=1\n", "hostfile:3: a stands there twice"),
        ("a slots=0\n", "hostfile:1: a has no slot"),
        ("me@a slots=2\n", "hostfile:1: 'me@a slots=2' is no host"),
        ("gpu[1-2] slots=2\n", "hostfile:1: "),
        ("# nobody\n", "names no host"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        read_hostfile(written(tmp_path, text))


@pytest.mark.parametrize(
    ("include", "exclude", "said"),
    [
        ("d", "", "--include: the hostfile has no host 'd'"),
        ("", "a:4", "--exclude: 'a:4': a has the slots 0 to 3"),
        ("a:x", "", "--include: 'a:x': a has the slots 0 to 3"),
        ("a", "b", "give --include or --exclude, not both"),
        ("", "a@b", "no host is left"),
        ("a@", "", "--include a@: a host's name is missing"),
        ("", "@b", "--exclude @b: a host's name is missing"),
        ("a@a:0", "", "--include a@a:0: a stands there twice"),
        ("", "a:0@a:1", "--exclude a:0@a:1: a stands there twice; name its slots once, as in a:0,1"),
    ],
)
def test_hosts_and_slots_that_are_not_there_are_refused(include, exclude, said):
    with pytest.raises(UserError, match=said):
        selected({"a": [0, 1, 2, 3], "b": [0]}, include, exclude)


def test_what_is_selected_is_what_deepspeed_selects():
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(200):
        hosts = {f"h{number}": draw.randint(1, 4) for number in range(draw.randint(1, 5))}
        parts = []
        for host in draw.sample(sorted(hosts), draw.randint(1, len(hosts))):
            slots = draw.sample(range(hosts[host]), draw.randint(1, hosts[host]))
            parts.append(draw.choice([host, f"{host}:{','.join(map(str, slots))}"]))
        include, exclude = draw.choice([("@".join(parts), ""), ("", "@".join(parts))])
        theirs = runner.parse_inclusion_exclusion(hosts, include, exclude)
        ours = {host: list(range(count)) for host, count in hosts.items()}
        if not theirs:
            with pytest.raises(UserError, match="no host is left"):
                selected(ours, include, exclude)
            continue
        assert selected(ours, include, exclude) == {host: sorted(slots) for host, slots in theirs.items()}
