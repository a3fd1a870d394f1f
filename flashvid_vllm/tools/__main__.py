# SPDX-License-Identifier: MIT
"""`flashvid COMMAND ...`, also as `python -m flashvid_vllm.tools`: each command is a module with a `main`."""

import importlib
import sys

# name -> module with `main(argv: list[str]) -> int`, what it does; imported only when it is asked for
COMMANDS = {
    "env": ("flashvid_vllm.tools.env", "versions, device and backend, for a bug report"),
    "tune": ("flashvid_vllm.tools.tune.__main__", "which ratio your videos allow, against a server"),
    "viz": ("flashvid_vllm.tools.viz.__main__", "draw what compression keeps of a video"),
    "play": ("flashvid_vllm.tools.play.__main__", "a page in the browser: plain and compressed answers side by side"),
}
EXAMPLES = (
    "flashvid tune clips/ --base-url http://localhost:8000/v1 -o report.html",
    "flashvid viz clip.mp4 --clip openai/clip-vit-base-patch16 -o kept.html",
)


def usage() -> str:
    lines = ["usage: flashvid COMMAND ...", ""]
    lines += [f"  {name:<6} {what}" for name, (_, what) in COMMANDS.items()]
    lines += ["", "flashvid COMMAND --help tells more; vllm serve MODEL --plugin flashvid serves.", "", "examples:"]
    return "\n".join([*lines, *(f"  {example}" for example in EXAMPLES), ""])


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
