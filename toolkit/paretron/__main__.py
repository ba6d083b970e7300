"""`python -m paretron` is the `paretron` command."""

from paretron.cli.main import main

if __name__ == "__main__":
    main()
