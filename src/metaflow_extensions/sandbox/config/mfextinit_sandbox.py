"""Configuration of metaflow-sandbox: `METAFLOW_SANDBOX_*` or Metaflow's JSON configuration.

Every name here can be imported from `metaflow.metaflow_config`. An environment
variable wins over the JSON file, which wins over the default.
"""

from metaflow.metaflow_config_funcs import from_conf

# The decorators that this extension registers. One list: the plugins, the spin
# guard below and the tests read it.
SANDBOX_DECORATORS = ["sandbox", "bubblewrap", "boxlite", "docker", "daytona", "e2b"]

# The backend of plain `@sandbox`. None: the first of the local backends that works here.
SANDBOX_BACKEND = from_conf("SANDBOX_BACKEND")
# The client program of @docker: "podman", or a path. None: docker, else podman.
SANDBOX_DOCKER = from_conf("SANDBOX_DOCKER")
# Numbers are texts here: `plugins/settings.py` says why, and has their bounds.
# Megabytes of memory for a sandbox whose step doesn't say; 0: no limit.
SANDBOX_MEMORY = from_conf("SANDBOX_MEMORY", "4096")
# Megabytes that a sandbox can write where the step doesn't say.
SANDBOX_DISK = from_conf("SANDBOX_DISK", "2048")
# Megabytes that one artifact may have when it is unpacked on the host.
SANDBOX_MAX_ARTIFACT = from_conf("SANDBOX_MAX_ARTIFACT", "1024")
# Megabytes of output that one attempt may print; the rest is dropped, and said.
SANDBOX_MAX_OUTPUT = from_conf("SANDBOX_MAX_OUTPUT", "16")
# Megabytes that the environments which were built on this machine may have together.
SANDBOX_CACHE = from_conf("SANDBOX_CACHE", "20480")
# What installs conda packages inside of sandboxes: micromamba, or a directory with
# bin/micromamba, for the processor that they have. Default: the one that Metaflow uses here.
SANDBOX_MICROMAMBA = from_conf("SANDBOX_MICROMAMBA")
# What a host may load of what a sandbox wrote: "data", names of classes, or "all", for
# steps that don't say. See docs/security.md.
SANDBOX_TRUST = from_conf("SANDBOX_TRUST", "data")
# Classes whose objects this host loads beside that, whatever the step said: "pkg.A,pkg.B".
SANDBOX_RELEASE = from_conf("SANDBOX_RELEASE")
# Seconds of CPU that loading one such artifact may take.
SANDBOX_MAX_LOAD = from_conf("SANDBOX_MAX_LOAD", "60")
# Sandboxes at once, and creations a second, for backends: "e2b=20,daytona=10". Across
# all runs of this user on this machine; what isn't named keeps its backend's default.
SANDBOX_CONCURRENT = from_conf("SANDBOX_CONCURRENT")
SANDBOX_PER_SECOND = from_conf("SANDBOX_PER_SECOND")

# Hours that your plan of E2B's lets a sandbox live: 1 without a subscription, 24 with one.
SANDBOX_E2B_HOURS = from_conf("SANDBOX_E2B_HOURS", "1")

# Flags are texts too. A private directory for each attempt, with what it did and when.
SANDBOX_DEBUG = from_conf("SANDBOX_DEBUG")
# Each attempt prints where its time went.
SANDBOX_TIMINGS = from_conf("SANDBOX_TIMINGS")

# `spin` skips every hook of a decorator that it doesn't know and would run the
# step on the host, unsandboxed, so it must refuse our names. A user's own list
# would replace ours: join them.
SPIN_DISALLOWED_DECORATORS = sorted(
    set(from_conf("SPIN_DISALLOWED_DECORATORS", ["parallel"])) | set(SANDBOX_DECORATORS)
)
