"""The agent (`agent.py`, which travels) and the host's reading of its frames (`frames.py`)."""

from pathlib import Path

#: The program that is sent into a sandbox.
AGENT = Path(__file__).with_name("agent.py")
