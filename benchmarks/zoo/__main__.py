"""The sweep: each model in a process of its own, a row each, and the page.

python -m benchmarks.zoo                       # all models
python -m benchmarks.zoo --shard 1/4           # a quarter; shards may run side by side
python -m benchmarks.zoo --only 'timm/*'       # by name
python -m benchmarks.zoo --new                 # those without a row, or with one that failed
python -m benchmarks.zoo --page                # only write the page anew
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from benchmarks.zoo import rows
from benchmarks.zoo.catalogue import chosen
from benchmarks.zoo.sweep import note_missing, run


def main() -> int:
    """Run the sweep; return 1 if a model failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", default="1/1", help="which part of how many, such as 2/4")
    parser.add_argument("--only", default="*", help="pattern of keys, such as 'torchvision/resnet*'")
    parser.add_argument("--new", action="store_true", help="only models without a row that is ok")
    parser.add_argument("--no-giants", action="store_true", help="leave out what takes many minutes")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--threads", type=int, default=1, help="torch's, in each process")
    arguments = parser.parse_args()
    cases = [] if arguments.page else chosen(arguments.only, arguments.shard, not arguments.no_giants)
    if arguments.new:
        done = {row["key"] for row in rows.read() if row["status"] in ("ok", "nothing to factorize")}
        cases = [case for case in cases if case.key not in done]
    statuses = Counter(run(case, arguments.threads)["status"].partition(":")[0] for case in cases)
    note_missing()
    rows.PAGE.write_text(rows.page(rows.read()), encoding="utf-8")
    print(dict(statuses))
    return int(statuses["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
