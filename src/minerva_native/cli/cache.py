"""Show or remove the prompts that LLM(cache_dir=...) keeps on disk."""

import argparse
import time

import minerva_native as mn

from .messages import as_json, printable, size
from .options import add_json, add_verbosity

_ACTIONS = {
    "list": "Show the files, the last used first.",
    "size": "Show how large the files are together.",
    "clear": "Remove the files.",
}

_UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary in _ACTIONS.items():
        action = actions.add_parser(name, help=summary, description=summary, argument_default=argparse.SUPPRESS)
        where = "the directory (default: minerva-native/prompts in $XDG_CACHE_HOME, or else in ~/.cache)"
        action.add_argument("directory", nargs="?", default=None, metavar="DIR", help=where)
        add_json(action)
        add_verbosity(action)


def run(options: argparse.Namespace) -> int:
    """Do it. A directory that is not there has no prompts."""
    files = mn.PromptFiles(options.directory)
    facts: dict[str, object] = {"directory": str(files.directory)}
    if options.action == "list":
        prompts = files.prompts()
        facts["prompts"] = [{**prompt._asdict(), "path": str(prompt.path)} for prompt in prompts]
        lines = [_described(prompt) for prompt in prompts]
    elif options.action == "size":
        facts["size_bytes"] = n_bytes = files.size_bytes
        lines = [size(n_bytes)]
    else:
        facts |= {"size_bytes": files.size_bytes, "removed": files.clear()}
        lines = [f"removed {facts['removed']} files"]
    if getattr(options, "json", False):
        print(as_json(facts))
        return 0
    for line in lines:
        print(printable(line))
    return 0


def _described(prompt: mn.CachedPrompt) -> str:
    seconds = max(0.0, time.time() - prompt.used)
    unit, name = next((pair for pair in _UNITS if seconds >= pair[0]), _UNITS[-1])
    tokens = f"tokens {prompt.start} to {prompt.start + prompt.n_tokens}"
    used = f"used {seconds // unit:.0f} {name} ago"
    return f"{prompt.path.name[33:41]}  {prompt.model}  {tokens}  {size(prompt.size_bytes)}  {used}"
