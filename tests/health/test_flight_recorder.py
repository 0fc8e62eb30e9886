"""What a user sets of NCCL's recorder stays, and the rest is set under the names that this torch knows."""

from __future__ import annotations

from pathlib import Path

import torch

from medpretrain.health.flight_recorder import dump_flight_recorder, enable_flight_recorder

NAMES = {
    "TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_FR_DUMP_ON_TIMEOUT": "TORCH_NCCL_DUMP_ON_TIMEOUT",
    "TORCH_FR_DUMP_TEMP_FILE": "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
}


def test_the_recorder_is_on_unless_the_user_chose_otherwise(monkeypatch, tmp_path):
    chosen: dict[str, str] = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0"}
    monkeypatch.setattr("os.environ", chosen)
    enable_flight_recorder(tmp_path)
    assert chosen.pop("TORCH_NCCL_TRACE_BUFFER_SIZE") == "0"
    prefix = str(tmp_path / "nccl_trace_rank_")
    assert chosen == {
        "TORCH_FR_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": prefix,
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix,
    }
    assert dump_flight_recorder(0) is None, "there is no NCCL group"


def test_this_torch_knows_the_names():
    libraries = Path(torch.__file__).parent / "lib"
    known = b"".join((libraries / name).read_bytes() for name in ("libtorch_cpu.so",))
    for new, old in NAMES.items():
        assert new.encode() in known or old.encode() in known
