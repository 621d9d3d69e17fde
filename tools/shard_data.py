"""Cut one split of a corpus into shards, check a data set, or describe it: `sepdist shard`.

python tools/shard_data.py write corpus=demo split=train output=demo/data/train num_workers=2
"""

import sys

from sepdist.cli.shard import main

if __name__ == "__main__":
    sys.exit(main())
