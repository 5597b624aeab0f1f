"""Models: the students, by name.

* :mod:`.building` turns a name and its arguments into a checked model.
* :mod:`.mlp`, :mod:`.cnn`, :mod:`.vit` and :mod:`.resnet` are the built-in ones.
* :mod:`.external` builds torchvision's, timm's and a user's own; :mod:`.stems` fits torchvision's to small images, and
  :mod:`.published` its files of weights to the names here.
"""

from __future__ import annotations

from codistill_worker.models.building import build, builtin_names, check

__all__ = ["build", "builtin_names", "check"]
