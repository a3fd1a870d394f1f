# SPDX-License-Identifier: MIT
"""`flashvid COMMAND ...`, also as `python -m flashvid_vllm.tools`: each command is a module with a `main`."""

import importlib
import sys

# name -> module with `main(argv: list[str]) -> int`, what it does; imported only when it is asked for
COMMANDS = {
    "viz": ("flashvid_vllm.viz.__main__", "draw what compression keeps of a video"),
    "play": ("flashvid_vllm.tools.play.__main__", "a page in the browser: plain and compressed answers side by side"),
}


def usage() -> str:
    lines = ["usage: flashvid COMMAND ...", ""]
    lines += [f"  {name:<6} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join([*lines, "", "flashvid COMMAND --help tells more; vllm serve MODEL --plugin flashvid serves.", ""])


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code is the command's, 2 where the user can put it right."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"flashvid: error: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[name][0])
    return int(module.main(rest))


if __name__ == "__main__":
    sys.exit(main())
