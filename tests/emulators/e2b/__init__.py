"""E2B on loopback, for its real SDK over real HTTP.

    cloud.py      sandboxes, templates, quotas and lifetimes
    control.py    the control plane's REST
    envd.py       the daemon in each sandbox: RPC on the stubs that the `e2b` wheel ships, and files
    __main__.py   serves all of it on one port: `python -m emulators.e2b`
    server.py     starts that for a test, and talks to its test API

What it does as the service does, as far as that is published or was recorded: a process that is
given a time is killed at its end, alone, without its children; output is dropped while nobody is
connected; an end waits until both outputs are closed; 30 s later it is forgotten; a sandbox that
is gone answers 502 with the service's own words; files are written by root and given to the user.

What it doesn't: a network (there is none inside, whatever was asked; what was asked is kept),
a disk's limit, terminals, watching directories, snapshots and forks, signed URLs. All users of a
sandbox are one where the emulator doesn't run as root. Images are a list of names, and each is
this machine's /usr.
"""
