"""`python -m mae_scale` is `mae-scale`."""

from mae_scale.cli import main

if __name__ == "__main__":
    main()
