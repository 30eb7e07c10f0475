"""boxlite with the image that the environment names, since a machine may have no network."""

import os

from metaflow_sandbox.backends.boxlite import Boxlite


class OfThisMachine(Boxlite):
    default_image = os.environ.get("VM_IMAGE") or Boxlite.default_image
