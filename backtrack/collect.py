"""`python -m backtrack.collect`: see backtrack/evaluate/collect.py."""

from backtrack.evaluate.collect import main
from model.errors import run

if __name__ == "__main__":
    run(main)
