"""Count the samples of datasets as the index, plain webdataset and DALI's own reader see them.

    python benchmarks/read_back.py DATASET ...

Ends with code 1 where they differ.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nvidia.dali.fn as fn
import webdataset
from nvidia.dali.pipeline import Pipeline

from data_prep.dataset import Dataset


def by_webdataset(shards: list[str]) -> int:
    """Samples that decode to an image and a record."""
    samples = webdataset.WebDataset(shards, shardshuffle=False).decode("pil")
    return sum(1 for sample in samples if any(key in sample for key in ("jpg", "png")) and "json" in sample)


def by_dali(shards: list[str], extension: str) -> int:
    """Samples that DALI's reader finds by the .idx files and decodes."""
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        indices = [shard.removesuffix(".tar") + ".idx" for shard in shards]
        encoded = fn.readers.webdataset(paths=shards, index_paths=indices, ext=[extension], name="reader")
        pipeline.set_outputs(fn.decoders.image(encoded, device="cpu"))
    pipeline.build()
    count = pipeline.reader_meta("reader")["epoch_size"]
    for _ in range(count):
        (image,) = pipeline.run()
        assert image.as_array().size > 0
    return count


def main(folders: list[str]) -> int:
    differ = False
    print("| dataset | index | webdataset | fn.readers.webdataset |\n| --- | ---: | ---: | ---: |")
    for folder in folders:
        dataset = Dataset.open(folder)
        shards = [str(dataset.path / "shards" / shard.name) for shard in dataset.info.shards]
        extension = dataset.index.column("extension")[0].as_py()
        counts = (len(dataset), by_webdataset(shards), by_dali(shards, extension))
        differ |= len(set(counts)) > 1
        print(f"| {Path(folder).name} | {counts[0]} | {counts[1]} | {counts[2]} |")
    return int(differ)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
