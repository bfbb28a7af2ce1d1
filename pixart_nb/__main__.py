"""``python -m pixart_nb``, the same program as ``pixart-nb``."""

from pixart_nb.cli import app

if __name__ == "__main__":
    app(prog_name="pixart-nb")
