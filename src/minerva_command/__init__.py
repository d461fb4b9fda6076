"""Where the `minerva` command begins: Ctrl-C while the rest is imported is no traceback."""


def main() -> int:
    """Run the command line; return the exit status."""
    try:
        from minerva_native.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 130
