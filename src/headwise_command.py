"""The script `headwise`: refuses a missing directory before torch takes its seconds to load.

It lies beside the package, for nothing in the package can run before `import headwise`, which
registers what transformers' AutoModel needs.
"""

import os
import sys
from pathlib import Path

# Commands whose first argument is a directory, never a name on a hub, and what they say of one that
# is missing; the same as the commands themselves say.
_MISSING = {
    "generate": "{} holds no model: there is no such directory",
    "sample": "{} holds no model: there is no such directory",
    "report": "{} holds no finished run (no record.json)",
}


def main() -> None:
    """Run the command line, or end with status 2 where its directory is missing.

    Ctrl-C is a line and status 130 while libraries are loaded, too, which takes seconds.
    """
    command, path, *_ = [*sys.argv[1:], "", ""]
    # Options may come before the directory, or a name be none that a line can show; then the
    # command finds out by itself.
    plain = path.isprintable() and not path.startswith("-")
    if command in _MISSING and path and plain and not os.path.exists(path):
        print(f"headwise: {_MISSING[command].format(Path(path))}", file=sys.stderr)
        raise SystemExit(2)
    try:
        from headwise.cli import main as run
    except KeyboardInterrupt:
        print("headwise: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    run()
