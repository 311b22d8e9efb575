"""`python -m dinat_backbones` is `dinat`, see dinat_backbones/cli."""

from .cli import main

if __name__ == "__main__":
    main()
