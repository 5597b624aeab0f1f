"""Models, by name.

* :mod:`.building` turns a name and its arguments into a checked model.
* :mod:`.mlp`, :mod:`.cnn`, :mod:`.vit` and :mod:`.resnet` are the built-in models.
* :mod:`.external` builds torchvision's models, timm's and a user's own.
* :mod:`.stems` fits torchvision's models to small images; :mod:`.pretrained_keys` renames the weights in its files.
"""

from __future__ import annotations

from codistill_worker.models.building import build, builtin_names, check

__all__ = ["build", "builtin_names", "check"]
