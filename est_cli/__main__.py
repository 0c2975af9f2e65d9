"""python -m est_cli is est-train."""

from est_cli.commands.train import main

if __name__ == "__main__":
    main()
