"""The host's side of metaflow-sandbox. Nothing in this package travels into a sandbox,
except the one file `agent/agent.py`."""
