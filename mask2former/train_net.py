#!/usr/bin/env python
"""Train or evaluate Mask2Former in Detectron2, from a checkout; see dinat_backbones/cli/train_detectron2.py."""

import sys

try:
    from dinat_backbones.cli.train_detectron2 import main
except ModuleNotFoundError as error:
    if error.name == "dinat_backbones":
        sys.exit(f"{sys.argv[0]}: the package is not installed; in the checkout, run: pip install -e .")
    if "pip install" not in str(error):
        raise
    sys.exit(f"{sys.argv[0]}: {error}")

if __name__ == "__main__":
    main()
