"""The program `mae-scale`, also as `python -m mae_scale`."""

import signal

# Until a command listens, Ctrl-C ends this process as it ends any program, without Python's traceback of an import.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    """Run the command line in sys.argv."""
    from mae_scale.cli.main import main as command_line

    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command_line()


if __name__ == "__main__":
    main()
