"""Standard input, a compose file, to standard output without the ports it publishes."""

import sys

import yaml


def main() -> None:
    stack = yaml.safe_load(sys.stdin)
    for service in stack["services"].values():
        service.pop("ports", None)
    yaml.safe_dump(stack, sys.stdout)


if __name__ == "__main__":
    main()
