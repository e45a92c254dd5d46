"""`python -m mae_scale` is `mae-scale`."""

from mae_scale.cli.main import main

if __name__ == "__main__":
    main()
