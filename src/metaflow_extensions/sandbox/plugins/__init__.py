"""What Metaflow registers. Loaded on the host and in every sandbox: stdlib and metaflow only."""

STEP_DECORATORS_DESC = [
    ("sandbox", ".decorators.SandboxDecorator"),
    ("bubblewrap", ".decorators.BubblewrapDecorator"),
    ("boxlite", ".decorators.BoxliteDecorator"),
    ("docker", ".decorators.DockerDecorator"),
    ("daytona", ".decorators.DaytonaDecorator"),
    ("e2b", ".decorators.E2BDecorator"),
]

# `flow.py sandbox step` launches a task elsewhere, which Metaflow calls a
# trampoline. Metaflow before 2.19.23 knows only CLIS_DESC: both name the same group.
TRAMPOLINE_CLIS_DESC = [("sandbox", ".cli.cli")]
CLIS_DESC = [("sandbox", ".cli.cli")]

ARTIFACT_SERIALIZERS_DESC = [("sandbox-pickle", ".tainted.TaintedPickle")]
