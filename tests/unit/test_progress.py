"""Who waits for an image or an environment sees lines, and on a terminal that something goes on."""

import os
import pty
import subprocess
import sys

SCRIPT = """
import anyio
from metaflow_sandbox.launch.progress import shown

async def work(say):
    if say_something:
        await say("the image [bold]x[/bold] is unpacked")
        await anyio.sleep(0.3)

with shown("train", print) as say:
    anyio.run(work, say)
print("done")
"""


def run(stderr, say_something=True):
    script = f"say_something = {say_something}\n{SCRIPT}"
    environment = {**os.environ, "TERM": "xterm"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, env=environment)
    assert done.returncode == 0
    return done.stdout.decode()


def at_a_terminal(**options):
    """What is printed, and what is drawn on the terminal beside it."""
    master, slave = pty.openpty()
    printed = run(slave, **options)
    os.close(slave)
    drawn = b""
    while piece := _read(master):
        drawn += piece
    os.close(master)
    return printed, drawn.decode()


def _read(master):
    try:
        return os.read(master, 4096)
    except OSError:  # so the kernel says that nobody has the other end
        return b""


def test_elsewhere_there_are_plain_lines():
    printed = run(subprocess.STDOUT)
    assert printed == "Step train: the image [bold]x[/bold] is unpacked\ndone\n"


def test_a_terminal_shows_that_something_goes_on_and_is_clean_afterwards():
    printed, drawn = at_a_terminal()
    assert "Step train: the image [bold]x[/bold] is unpacked" in printed
    assert "train: the image [bold]x[/bold]" in drawn and "0:00:00" in drawn
    assert drawn.rstrip().endswith("\x1b[2K")  # the line is erased


def test_nothing_is_drawn_where_nothing_has_to_be_made():
    assert at_a_terminal(say_something=False) == ("done\n", "")
